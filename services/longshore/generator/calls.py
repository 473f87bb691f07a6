"""Calls in progress: what is asked of the engine, by gRPC or by HTTP, and what it has said of each.

Lives on the event loop; the engine's events come to it from the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

from longshore.errors import NotFound, Unavailable
from longshore.generator import metrics
from longshore.generator.engine import Engine, EngineEvent, EngineRequest, RequestFailed
from longshore.types import FinishReason, JobRef


class Call:
    """One request: what the engine said of it that has not been taken yet."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        # Bounded by the tokens of one reply.
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        # How it ended; a word of a small set.
        self.outcome = "aborted"

    def stop(self) -> None:
        """Nothing more is wanted: the reply has ended as it should, though the engine does not know it."""
        self.outcome = FinishReason.STOP.value
        self._abort()

    def put(self, event: EngineEvent) -> None:
        self._events.put_nowait(event)

    async def next(self) -> EngineEvent:
        """The next event. The last one has `finish` or is a RequestFailed; it comes by the request's deadline."""
        event = await self._events.get()
        if isinstance(event, RequestFailed):
            self.outcome = event.failure.value
        elif event.finish is not None:
            self.outcome = event.finish.value
        return event


class Calls:
    """All calls on the process's one engine."""

    def __init__(self, job: JobRef) -> None:
        # None until the first version is proven.
        self.engine: Engine | None = None
        # Makes a version resident; None: only what the engine follows is served.
        self.keep: Callable[[int], Awaitable[None]] | None = None
        self._labels = (job.project, job.job)
        self._loop = asyncio.get_running_loop()
        # A caller's id may come again while the engine still ends the request before it: the engine gets our own ids.
        self._serials = itertools.count()
        self._open: dict[str, Call] = {}

    def deliver(self, events: Sequence[EngineEvent]) -> None:
        """Takes the engine's events, on the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            call = self._open.get(event.request_id)
            if call is not None:
                call.put(event)

    def proven(self) -> Engine:
        """The engine. Raises Unavailable while no version has been proven."""
        if self.engine is None:
            raise Unavailable("no policy version has been proven yet")
        return self.engine

    def new_id(self) -> str:
        """An id for the engine that no other request has."""
        return str(next(self._serials))

    @contextlib.contextmanager
    def open(self, request: EngineRequest) -> Iterator[Call]:
        """Submits a request, and aborts it at the end of the block if it has not ended by then.

        Raises:
            Rejected, QueueFull, Unavailable: see Engine.submit.
        """
        engine = self.proven()
        call = Call(partial(engine.abort, request.request_id))
        # Before the submission: the engine's thread may be quick.
        self._open[request.request_id] = call
        try:
            engine.submit(request)
        except BaseException:
            del self._open[request.request_id]
            raise
        try:
            yield call
        finally:
            # However the call ended: the engine ignores ids that it has finished.
            engine.abort(request.request_id)
            del self._open[request.request_id]
            metrics.REPLIES.labels(*self._labels, call.outcome).inc()

    async def have_resident(self, request: EngineRequest) -> None:
        """Brings the version that a request is pinned to, if it is none of those in memory.

        One above the served version that cannot be brought may be still to come: the engine waits for it. Raises
        NotFound, IntegrityError, Unavailable.
        """
        pinned = request.version.min_version
        if pinned is None or pinned != request.version.max_version or self.keep is None:
            return
        status = self.proven().status()
        if status.version is None or pinned in (status.version, *status.beside):
            return
        try:
            async with asyncio.timeout(request.deadline - time.monotonic()):
                await self.keep(pinned)
        except (NotFound, Unavailable):
            if pinned < status.version:
                raise
        except TimeoutError:
            raise Unavailable(f"version {pinned} could not be brought within the request's deadline") from None
