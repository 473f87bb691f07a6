"""Follows one pointer of a job over a Watch stream that is reopened for as long as it is wanted.

Where copies are kept, versions are pushed along: what this stream has brought is handed out by `arrived`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc.aio
import structlog

from longshore.errors import LongshoreError, Rejected
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.types import JobRef
from longshore.weight_store import metrics
from longshore.weight_store.copies import Copies
from longshore.weight_store.decoding import CODECS
from longshore.weight_store.version import PointerState
from longshore.weights.arrivals import Arrivals, Arrived
from longshore.weights.calls import Backoff, translated
from longshore.weights.manifests import Manifests

log = structlog.get_logger()


@dataclass(frozen=True)
class News:
    """What a watch tells of a version.

    Example: News(7, published=False)  # its bytes are here; News(7, published=True)  # the pointer names it
    """

    version: int
    # False: may be fetched and staged, but not served.
    published: bool


class PointerWatch:
    """One pointer, from the first to the last stream."""

    def __init__(
        self,
        stub: weights_pb2_grpc.WeightsServiceAsyncStub,
        job: JobRef,
        name: str,
        manifests: Manifests,
        copies: Copies[int],
    ) -> None:
        self.name = name
        # With the highest serial seen.
        self.state: PointerState | None = None
        self._stub = stub
        self._job = job
        self._manifests = manifests
        self._copies = copies
        self._arrivals = self._new_arrivals()
        self._call: grpc.aio.UnaryStreamCall[weights_pb2.WatchRequest, weights_pb2.WatchResponse] | None = None
        # The newest version that came whole before its pointer.
        self._ahead: int | None = None
        self._moved = asyncio.Event()
        # One stream serves every reader of `news`.
        self._readers = 0
        self._follower: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Ends every `news`."""
        self._closed.set()
        self._wake()
        if self._call is not None:
            self._call.cancel()

    def note(self, state: PointerState) -> None:
        """Takes in where the pointer stands, from whichever call; a serial that does not grow is old news."""
        if self.state is None or self.state.serial < state.serial:
            self.state = state
            self._arrivals.confirm(state.version)
            self._wake()

    def names(self, version: int) -> bool:
        """Whether the pointer is known to name the version."""
        return self.state is not None and self.state.version == version

    async def arrived(self, version: int) -> Arrived | None:
        """A version that was pushed, proven; None when it was not, or is not to be had in that way."""
        try:
            return await self._arrivals.get(version)
        except (LongshoreError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _cancelled_from_outside():
                raise
            return None

    async def news(self) -> AsyncGenerator[News, None]:
        """Yields versions as they come, and as the pointer names them; the newest when several were missed.

        Lasts until `close`, through any absence of the store. A pointer that is not signed by the job, has expired, or
        has a serial below one seen before is logged and passed over.
        """
        self._readers += 1
        if self._follower is None:
            self._follower = asyncio.create_task(self._follow(), name=f"watch {self.name}")
            # It only returns when the watch is closed, or with an error that the readers must see.
            self._follower.add_done_callback(lambda _: self._wake())
        follower = self._follower
        serial, ahead = -1, None
        try:
            while True:
                moved, state = self._moved, self.state
                if state is not None and state.serial > serial and state.expires_at > time.time():
                    serial = state.serial
                    yield News(state.version, published=True)
                elif self._ahead is not None and self._ahead != ahead:
                    ahead = self._ahead
                    yield News(ahead, published=False)
                elif follower.done():
                    follower.result()
                    return
                else:
                    await moved.wait()
        finally:
            self._readers -= 1
            if not self._readers:
                self._follower = None
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)
                self._arrivals.close()

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _follow(self) -> None:
        backoff = Backoff()
        while not self._closed.is_set():
            self._arrivals.close()
            self._arrivals = self._new_arrivals()
            try:
                await self._stream(backoff)
            except grpc.aio.AioRpcError as error:
                log.info("watch broke", job=str(self._job), pointer=self.name, reason=str(translated(error)))
            except LongshoreError as error:
                # The store believes that we hold what we do not: the next stream tells it anew.
                metrics.fault(self._job, "push")
                log.warning("a pushed version was refused", job=str(self._job), reason=str(error))
            except (asyncio.CancelledError, grpc.aio.UsageError):
                # A closed channel cancels its calls and refuses new ones; any other cancellation is our caller's.
                if not self._closed.is_set():
                    raise
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), backoff.next())

    async def _stream(self, backoff: Backoff) -> None:
        push = self._copies.max_bytes > 0
        request = weights_pb2.WatchRequest(
            job=self._manifests.job_proto,
            pointer=self.name,
            push=push,
            have=self._copies.keys() if push else (),
            codecs=CODECS if push else (),
        )
        self._call = self._stub.Watch(request)
        try:
            async for response in self._call:
                await self._take(response)
                if not (response.HasField("push") or response.chunk):
                    # Not for a version alone: a store may send the same bad one again and again.
                    backoff.reset()
        finally:
            self._call.cancel()
            self._call = None

    async def _take(self, response: weights_pb2.WatchResponse) -> None:
        if response.HasField("push") or response.HasField("pointer"):
            short = self._arrivals.cut_short()
            if short is not None:
                self._fault(short, Rejected("chunk", "fewer bytes came than were announced"))
        if response.HasField("push"):
            self._arrivals.begin(await self._manifests.opened(response.push.manifest), response.push)
        if response.chunk:
            whole = self._arrivals.add(response.chunk)
            if whole is not None:
                self._ahead = whole
                self._wake()
        if response.push_broken:
            self._arrivals.broken()
        if response.HasField("pointer"):
            await self._pointed(response.pointer)

    async def _pointed(self, signed: weights_pb2.SignedPointer) -> None:
        try:
            state = await self._manifests.pointer(signed, self.name)
            if state.expires_at <= time.time():
                raise Rejected("expired", f"{self.name} expired {time.time() - state.expires_at:.0f} s ago")
            if self.state is not None and state.serial < self.state.serial:
                raise Rejected("serial", f"{self.name} was seen with serial {self.state.serial}, not {state.serial}")
        except LongshoreError as error:
            metrics.fault(self._job, "pointer")
            log.warning("a pointer was passed over", job=str(self._job), pointer=self.name, reason=str(error))
        else:
            self.note(state)

    def _new_arrivals(self) -> Arrivals:
        return Arrivals(self._copies, self._fault)

    def _fault(self, version: int, error: LongshoreError) -> None:
        metrics.fault(self._job, "push")
        log.warning("a pushed version could not be proven", job=str(self._job), version=version, reason=str(error))


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
