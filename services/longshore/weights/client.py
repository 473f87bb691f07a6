"""The weight store as a learner, a generator or an actor sees it: the one module of `weights` that others import.

async for version in client.watch_head():
    policy = await client.fetch(version)      # every tensor checked against the learner's signature

What comes back was verified against the job's public key, so that neither the store nor anything between has to be
trusted. Hashing and packing run in threads. Needs neither torch nor obstore.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc.aio
import structlog

from longshore.errors import Fenced, IntegrityError, LongshoreError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.channel import channel
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store import bundle, payload
from longshore.weight_store.payload import Tensor
from longshore.weight_store.version import (
    HEAD,
    CanaryProbe,
    PointerState,
    PolicyVersion,
    VersionDraft,
    checksum_of,
    open_manifest,
    open_pointer,
    pointer_state,
    policy_version,
    tensor_infos,
)
from longshore.weights.calls import Backoff, repeat, translated
from longshore.weights.parcel import pack

__all__ = ["CanaryProbe", "PolicyVersion", "Tensor", "VersionDraft", "WeightsClient", "checksum_of"]

# Bounds what a broken store could make us hold: an archive is a little larger than its files.
_MAX_ARCHIVE_BYTES = bundle.MAX_BUNDLE_BYTES + 1024 * 1024

log = structlog.get_logger()


class WeightsClient:
    """One job's versions.

    Calls raise NotFound, Conflict, Fenced, Rejected (the store's answer), IntegrityError (what came does not match its
    signature or checksum) and Unavailable (no answer within `timeout` seconds; they try until then).
    """

    def __init__(self, address: str, job: JobRef, public_key: bytes) -> None:
        self.job = job
        self._public_key = public_key
        self._channel = channel(address)
        self._stub = weights_pb2_grpc.WeightsServiceStub(self._channel)
        self._job = convert.job_to_proto(job)
        # Head with the highest serial seen by any call.
        self._head: PointerState | None = None
        # The bundle that the store has from us: our versions keep it there.
        self._sent_assets: bytes | None = None
        self._closed = asyncio.Event()

    async def close(self) -> None:
        """Ends every call and watch."""
        self._closed.set()
        await self._channel.close()

    async def register_key(self, keep: int, timeout: float = 30.0) -> None:
        """Tells the store the job's public key and how many versions to keep. Raises Conflict: it has another key."""
        request = weights_pb2.RegisterKeyRequest(job=self._job, public_key=self._public_key, keep=keep)
        await repeat(lambda left: self._stub.RegisterKey(request, timeout=left), timeout)

    async def publish(
        self,
        key: SigningKey,
        draft: VersionDraft,
        tensors: Sequence[Tensor],
        assets: Mapping[str, bytes],
        timeout: float = 120.0,
    ) -> bool:
        """Publishes a version and moves head to it. True when this very version was there already.

        Raises:
            ValueError: the draft or a tensor makes no sense.
            Fenced: a newer learner epoch has published: stop.
            Conflict: another manifest holds the number.
        """
        deadline = time.monotonic() + timeout
        serial = await self._next_serial(timeout)
        parcel = await asyncio.to_thread(pack, self.job, key, draft, tensors, assets, serial)
        assets_sha256 = parcel.assets_sha256
        if assets_sha256 == self._sent_assets:
            parcel.header.ClearField("assets")

        async def attempt(left: float) -> weights_pb2.PublishResponse:
            response: weights_pb2.PublishResponse = await self._stub.Publish(parcel.messages(), timeout=left)
            return response

        response = await repeat(attempt, deadline - time.monotonic(), precondition=Fenced)
        self._sent_assets = assets_sha256
        self._note(pointer_state(parcel.header.head))
        return response.existed

    async def describe(self, version: int, timeout: float = 30.0) -> PolicyVersion:
        """A version's manifest, verified; its `tensors` is None."""
        manifest, _ = await self._version(version, timeout)
        return policy_version(manifest, None)

    async def fetch(self, version: int, timeout: float = 120.0) -> PolicyVersion:
        """A version with all its tensors, each verified; a broken transfer goes on where it broke."""
        deadline = time.monotonic() + timeout
        manifest, encodings = await self._version(version, timeout)
        infos = tensor_infos(manifest)
        full = [
            item for item in encodings if item.kind == weights_pb2.ENCODING_KIND_FULL and item.codec == payload.CODEC
        ]
        if not full:
            raise NotFound(f"{self.job} has no full encoding of version {version}")
        limit = payload.max_payload_bytes(infos)
        data = await self._download(full[0].sha256, limit, deadline - time.monotonic())
        tensors = await asyncio.to_thread(payload.decode, data, infos)
        return policy_version(manifest, tensors)

    async def head(self, timeout: float = 30.0) -> int:
        """The version that head names now. Raises NotFound at once when the job has none yet, or it has expired."""
        state = await repeat(self._read_head, timeout)
        if state is None or state.expires_at <= time.time():
            raise NotFound(f"{self.job} has no head" if state is None else f"the head of {self.job} has expired")
        return state.version

    async def watch_head(self) -> AsyncIterator[int]:
        """Yields the version that head names, and again each time it moves; the newest when several moves were missed.

        Lasts until the client is closed, through any absence of the store. A head that is not signed by the job's
        key, has expired, or has a serial below one seen before is logged and passed over.
        """
        moved = asyncio.Event()
        follower = asyncio.create_task(self._follow_head(moved))
        # The follower only returns when the client is closed, or with an error that the caller must see.
        follower.add_done_callback(lambda _: moved.set())
        serial = -1
        try:
            while True:
                await moved.wait()
                moved.clear()
                state = self._head
                if state is not None and state.serial > serial and state.expires_at > time.time():
                    serial = state.serial
                    yield state.version
                if follower.done():
                    follower.result()
                    return
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower

    async def assets(self, sha256: str, timeout: float = 60.0) -> dict[str, bytes]:
        """The files of an asset bundle (PolicyVersion.assets_sha256), verified."""
        digest = bytes.fromhex(sha256)
        archive = await self._download(digest, _MAX_ARCHIVE_BYTES, timeout)
        return await asyncio.to_thread(_unpack, digest, archive)

    async def versions(self, limit: int = 100, timeout: float = 30.0) -> list[int]:
        """Versions on hand, newest first; at most 1000."""
        request = weights_pb2.ListVersionsRequest(job=self._job, weight_set=weights_pb2.WEIGHT_SET_POLICY, limit=limit)
        response = await repeat(lambda left: self._stub.ListVersions(request, timeout=left), timeout)
        return list(response.versions)

    async def _next_serial(self, timeout: float) -> int:
        """Above every serial of head so far, even where this machine's clock is behind."""
        if self._head is None:
            await repeat(self._read_head, timeout)
        last = self._head.serial if self._head else -1
        return max(time.time_ns() // 1_000_000, last + 1)

    async def _version(
        self, version: int, timeout: float
    ) -> tuple[weights_pb2.Manifest, Sequence[weights_pb2.Encoding]]:
        request = weights_pb2.GetVersionRequest(
            job=self._job, version=version, weight_set=weights_pb2.WEIGHT_SET_POLICY
        )
        response = await repeat(lambda left: self._stub.GetVersion(request, timeout=left), timeout)
        manifest = open_manifest(self._public_key, response.manifest, self.job)
        if (manifest.version, manifest.weight_set) != (version, request.weight_set):
            raise IntegrityError(f"the store answered with version {manifest.version}, {version} was asked for")
        return manifest, response.encodings

    async def _download(self, sha256: bytes, limit: int, timeout: float) -> bytearray:
        data = bytearray()

        async def attempt(left: float) -> bytearray:
            request = weights_pb2.FetchRequest(job=self._job, sha256=sha256, offset=len(data))
            total = None
            async for response in self._stub.Fetch(request, timeout=left):
                total = response.total_size if total is None else total
                data.extend(response.chunk)
                if len(data) > min(total, limit):
                    raise IntegrityError(f"{sha256.hex()} has more bytes than it can have")
            if len(data) != total:
                raise Unavailable(f"{sha256.hex()} ended after {len(data)} bytes of {total}")
            return data

        return await repeat(attempt, timeout)

    async def _read_head(self, left: float) -> PointerState | None:
        """Head's present state, which the first message of a Watch tells; None while there is none."""
        call = self._stub.Watch(weights_pb2.WatchRequest(job=self._job), timeout=left)
        try:
            async for response in call:
                if not response.HasField("pointer"):
                    return None
                self._note(self._opened_head(response.pointer))
                return self._head
        finally:
            call.cancel()
        raise Unavailable("the store ended a watch before its first message")

    async def _follow_head(self, moved: asyncio.Event) -> None:
        """Keeps `_head` at the newest head and sets `moved` after each message, until the client is closed."""
        backoff = Backoff()
        while not self._closed.is_set():
            try:
                async for response in self._stub.Watch(weights_pb2.WatchRequest(job=self._job)):
                    backoff.reset()
                    if response.HasField("pointer"):
                        self._take_head(response.pointer)
                        moved.set()
            except grpc.aio.AioRpcError as error:
                log.info("watch of head broke", job=str(self.job), reason=str(translated(error)))
            except (asyncio.CancelledError, grpc.aio.UsageError):
                # A closed channel cancels its calls and refuses new ones; any other cancellation is our caller's.
                if not self._closed.is_set():
                    raise
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), backoff.next())

    def _take_head(self, signed: weights_pb2.SignedPointer) -> None:
        try:
            state = self._opened_head(signed)
        except LongshoreError as error:
            log.warning("a head was passed over", job=str(self.job), reason=str(error))
            return
        self._note(state)

    def _opened_head(self, signed: weights_pb2.SignedPointer) -> PointerState:
        state = open_pointer(self._public_key, signed, self.job)
        if state.name != HEAD:
            raise Rejected("pointer", f"head was asked for, {state.name} came")
        return state

    def _note(self, state: PointerState) -> None:
        if self._head is None or self._head.serial < state.serial:
            self._head = state


def _unpack(sha256: bytes, archive: bytearray) -> dict[str, bytes]:
    if hashlib.sha256(archive).digest() != sha256:
        raise IntegrityError("the asset bundle does not match its SHA-256")
    return bundle.unpack(bytes(archive))
