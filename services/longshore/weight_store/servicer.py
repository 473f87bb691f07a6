"""WeightsService over one store: between gRPC and `store.py`. Served by the origin, and by a relay for its site.

The store blocks, so every call into it runs in a thread. A payload is spooled in an unnamed file, and stored only once
it is whole and has been checked; watchers who asked for it are sent it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
import structlog

from longshore.errors import Conflict, Fenced, IntegrityError, LongshoreError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import job_pb2, weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.server import rpc_method, rpc_stream
from longshore.types import JobRef
from longshore.weight_store import metrics
from longshore.weight_store.hub import PointerHub
from longshore.weight_store.incoming import CHUNK_BYTES, Incoming
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StorageFull
from longshore.weight_store.planner import path_kind
from longshore.weight_store.pushing import Pushes, Wanted, path_to_proto, stored_chunks
from longshore.weight_store.store import POLICY, Admission, VersionTaken, WeightStore
from longshore.weight_store.version import HEAD, PointerState

SERVICE = "longshore.proto.v1.WeightsService"
# What a rollout site may call at home: it reads what its job has published.
SITE_METHODS = frozenset(
    f"/{SERVICE}/{name}" for name in ("GetKeys", "GetVersion", "Fetch", "Watch", "ListPointers", "ListVersions")
)
MAX_HAVE = 64
# A publisher that sends nothing for this long is taken for dead.
_IDLE_S = 60.0

# A mirror's version waits for this long to be said to be published.
_CONFIRM_S = 600.0

log = structlog.get_logger()

T = TypeVar("T")

Context = grpc.aio.ServicerContext[Any, Any]


class Upstream(Protocol):
    """Where a site's store gets what it does not have."""

    async def bring(self, version: int) -> None:
        """Gets a policy version of the site's job. Raises NotFound, Unavailable."""

    def follow(self, pointer: str) -> None:
        """Mirrors a pointer from now on."""


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """WeightsService over one store."""

    def __init__(self, store: WeightStore, spool_folder: str | None, mirrored: JobRef | None = None) -> None:
        """
        Args:
            mirrored: the one job that a relay serves. Its store is filled from home, so that callers may only read.
        """
        # Set by a relay.
        self.upstream: Upstream | None = None
        self._mirrored = mirrored
        self._store = store
        self._spool_folder = spool_folder
        self._hub = PointerHub()
        # Publishes that are being committed, held here because the event loop does not hold its tasks.
        self._settling: set[asyncio.Task[bool]] = set()

    def close(self) -> None:
        """Ends every Watch, so that draining does not wait for them."""
        self._hub.close()

    @rpc_method
    async def RegisterKey(  # noqa: N802 - the contract's name
        self, request: weights_pb2.RegisterKeyRequest, context: Context
    ) -> weights_pb2.RegisterKeyResponse:
        self._check_writable()
        job = convert.job_from_proto(request.job)
        await asyncio.to_thread(self._store.register_key, job, request.public_key, request.keep)
        log.info("key registered", job=str(job), keep=request.keep)
        return weights_pb2.RegisterKeyResponse()

    @rpc_method
    async def RotateKey(  # noqa: N802 - the contract's name
        self, request: weights_pb2.RotateKeyRequest, context: Context
    ) -> weights_pb2.RotateKeyResponse:
        self._check_writable()
        await asyncio.to_thread(self._store.rotate_key, request.rotation)
        return weights_pb2.RotateKeyResponse()

    @rpc_method
    async def GetKeys(  # noqa: N802 - the contract's name
        self, request: weights_pb2.GetKeysRequest, context: Context
    ) -> weights_pb2.GetKeysResponse:
        first, rotations = await asyncio.to_thread(self._store.keys, self._job(request.job))
        return weights_pb2.GetKeysResponse(public_key=first, rotations=rotations)

    @rpc_method
    async def Publish(  # noqa: N802 - the contract's name
        self, requests: AsyncIterator[weights_pb2.PublishRequest], context: Context
    ) -> weights_pb2.PublishResponse:
        self._check_writable()
        try:
            header = await _header(requests)
            existed = await self.take(header, _chunks(requests), heads=header.HasField("head"))
        except VersionTaken as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
        except StorageFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return weights_pb2.PublishResponse(existed=existed)

    @rpc_method
    async def GetVersion(  # noqa: N802 - the contract's name
        self, request: weights_pb2.GetVersionRequest, context: Context
    ) -> weights_pb2.GetVersionResponse:
        key = VersionKey(request.weight_set, request.version)
        job = self._job(request.job)
        _check_have(request.have)
        try:
            manifest, encodings = await asyncio.to_thread(self._store.version, job, key)
        except NotFound:
            if self.upstream is None or key.weight_set != POLICY:
                raise
            await self.upstream.bring(key.version)
            manifest, encodings = await asyncio.to_thread(self._store.version, job, key)
        steps = await asyncio.to_thread(self._store.path, job, key, set(request.have), set(request.codecs))
        metrics.PATHS.labels(job.project, job.job, path_kind(steps)).inc()
        return weights_pb2.GetVersionResponse(manifest=manifest, encodings=encodings, path=path_to_proto(steps or ()))

    @rpc_stream
    async def Fetch(  # noqa: N802 - the contract's name
        self, request: weights_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[weights_pb2.FetchResponse]:
        job = self._job(request.job)
        path, size = await asyncio.to_thread(self._store.find, job, request.sha256)
        if request.offset > size:
            raise Rejected("offset", f"offset {request.offset} is past the end at {size}")
        sent = metrics.SENT_BYTES.labels(job.project, job.job)
        yield weights_pb2.FetchResponse(total_size=size)
        async for chunk in stored_chunks(self._store, path, size, request.offset):
            yield weights_pb2.FetchResponse(chunk=chunk)
            sent.inc(len(chunk))

    @rpc_stream
    async def Watch(  # noqa: N802 - the contract's name
        self, request: weights_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[weights_pb2.WatchResponse]:
        job, name = self._job(request.job), request.pointer or HEAD
        _check_have(request.have)
        if self.upstream is not None:
            self.upstream.follow(name)
        pushes = Pushes(self._store, self._hub, job, name, _wanted(request))
        sent = metrics.PUSHED_BYTES.labels(job.project, job.job)
        with metrics.WATCHERS.labels(job.project, job.job).track_inprogress():
            async with contextlib.aclosing(pushes.responses()) as responses:
                async for response in responses:
                    yield response
                    sent.inc(len(response.chunk))

    @rpc_method
    async def SetPointer(  # noqa: N802 - the contract's name
        self, request: weights_pb2.SetPointerRequest, context: Context
    ) -> weights_pb2.SetPointerResponse:
        self._check_writable()
        await self.point(request.pointer)
        return weights_pb2.SetPointerResponse()

    @rpc_method
    async def ListPointers(  # noqa: N802 - the contract's name
        self, request: weights_pb2.ListPointersRequest, context: Context
    ) -> weights_pb2.ListPointersResponse:
        pointers = await asyncio.to_thread(self._store.pointers, self._job(request.job))
        return weights_pb2.ListPointersResponse(pointers=pointers)

    @rpc_method
    async def ListVersions(  # noqa: N802 - the contract's name
        self, request: weights_pb2.ListVersionsRequest, context: Context
    ) -> weights_pb2.ListVersionsResponse:
        job = self._job(request.job)
        before = request.before if request.HasField("before") else None
        limit = min(request.limit or 100, 1000)
        numbers = await asyncio.to_thread(self._store.versions, job, request.weight_set, before, limit)
        return weights_pb2.ListVersionsResponse(versions=numbers)

    async def point(self, signed: weights_pb2.SignedPointer) -> None:
        """Moves a pointer and tells its watchers. Raises as WeightStore.set_pointer."""
        state = await asyncio.to_thread(self._store.set_pointer, signed)
        self._moved(state, signed)

    async def take(
        self,
        header: weights_pb2.PublishHeader,
        chunks: AsyncIterator[bytes],
        *,
        heads: bool,
        confirmed: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> bool:
        """Publishes a version whose bytes are still to come; True when it was there already.

        Args:
            chunks: the encoding's bytes, at most CHUNK_BYTES each.
            heads: head will name the version, if not by this header then soon: who watches it is sent the bytes.
            confirmed: waited for when the bytes have been proven and before anything is written; raises to refuse them.

        Raises:
            Unavailable, StorageFull, and as WeightStore.admit and commit.
        """
        # Before any payload is taken: nobody without the job's key fills our disk.
        admission = await asyncio.to_thread(self._store.admit, header)
        incoming = Incoming(admission.key.version, header.manifest, admission.encoding, self._spool_folder)
        try:
            # A version with a bundle that nobody has yet is of no use before the bundle can be fetched.
            if heads and not header.assets:
                self._hub.announce(admission.job, HEAD, incoming)
            await _receive(chunks, admission, incoming)
        except BaseException:
            self._end(admission, incoming, published=False)
            raise
        # Goes on when the caller hangs up: what is written must also be told to the watchers.
        settling = asyncio.create_task(self._settle(admission, incoming, confirmed))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        return await asyncio.shield(settling)

    def _job(self, told: job_pb2.JobRef) -> JobRef:
        """The job that is asked for. Raises NotFound: a relay mirrors another."""
        job = convert.job_from_proto(told)
        if self._mirrored is not None and job != self._mirrored:
            raise NotFound(f"this relay has the versions of {self._mirrored}, not of {job}")
        return job

    def _check_writable(self) -> None:
        """Raises Rejected at a relay: what a caller wrote here, the mirror could never bring to what home has."""
        if self._mirrored is not None:
            raise Rejected("relay", "a relay takes keys, versions and pointers from home alone: send them there")

    def _end(self, admission: Admission, incoming: Incoming, *, published: bool) -> None:
        incoming.settle(published)
        self._hub.retire(admission.job, HEAD, incoming)
        incoming.close()

    async def _settle(
        self, admission: Admission, incoming: Incoming, confirmed: Callable[[], Coroutine[Any, Any, None]] | None
    ) -> bool:
        job, result, published = admission.job, "failed", False
        loop = asyncio.get_running_loop()

        def confirm() -> None:
            if confirmed is None:
                return
            waiting = asyncio.run_coroutine_threadsafe(confirmed(), loop)
            try:
                waiting.result(_CONFIRM_S)
            except TimeoutError:
                waiting.cancel()
                raise Unavailable(f"version {admission.key.version} was not confirmed in {_CONFIRM_S:.0f} s") from None

        try:
            with metrics.PUBLISH_SECONDS.labels(job.project, job.job).time():
                existed = await asyncio.to_thread(self._store.commit, admission, incoming.file, confirm)
            result, published = "existed" if existed else "published", True
        except (Conflict, IntegrityError, Rejected) as error:
            result = _result_of(error)
            raise
        finally:
            metrics.PUBLISHES.labels(job.project, job.job, result).inc()
            self._end(admission, incoming, published=published)
        if admission.head is not None:
            self._moved(admission.head, admission.record.head)
        log.info("published", job=str(job), version=admission.key.version, existed=existed)
        await self._collect(job)
        return existed

    async def _collect(self, job: JobRef) -> None:
        try:
            removed = await asyncio.to_thread(self._store.collect, job)
        except LongshoreError as error:
            # The version is published; what could not be removed now goes after the next publish.
            metrics.RETENTION_FAILURES.inc()
            log.warning("retention failed", job=str(job), reason=str(error))
            return
        metrics.REMOVED_OBJECTS.labels(job.project, job.job).inc(removed)

    def _moved(self, state: PointerState, signed: weights_pb2.SignedPointer) -> None:
        self._hub.move(state, signed)
        if state.name == HEAD:
            metrics.HEAD_VERSION.labels(state.job.project, state.job.job).set(state.version)


async def _header(requests: AsyncIterator[weights_pb2.PublishRequest]) -> weights_pb2.PublishHeader:
    first = await _next(requests)
    if first is None or first.WhichOneof("part") != "header":
        raise Rejected("malformed", "a publish begins with its header")
    return first.header


async def _chunks(requests: AsyncIterator[weights_pb2.PublishRequest]) -> AsyncIterator[bytes]:
    while (request := await _next(requests)) is not None:
        yield request.chunk


async def _next(items: AsyncIterator[T]) -> T | None:
    """The next item; None at the end. Raises Unavailable when the sender has gone quiet."""
    try:
        async with asyncio.timeout(_IDLE_S):
            return await anext(items, None)
    except TimeoutError:
        raise Unavailable(f"nothing was received for {_IDLE_S:.0f} s") from None


async def _receive(chunks: AsyncIterator[bytes], admission: Admission, incoming: Incoming) -> None:
    """Takes the payload in. Raises Rejected for more of it than was announced."""
    size = admission.encoding.size
    received = metrics.RECEIVED_BYTES.labels(admission.job.project, admission.job.job)
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        if not 0 < len(chunk) <= CHUNK_BYTES or count > size:
            raise Rejected("chunk", f"chunks have 1 to {CHUNK_BYTES} bytes, {size} in all")
        await incoming.write(chunk)
        received.inc(len(chunk))


def _check_have(have: Sequence[int]) -> None:
    if len(have) > MAX_HAVE:
        raise Rejected("have", f"{len(have)} versions; at most {MAX_HAVE} may be named")


def _wanted(request: weights_pb2.WatchRequest) -> Wanted | None:
    return Wanted(tuple(request.have), tuple(request.codecs)) if request.push else None


def _result_of(error: LongshoreError) -> str:
    if isinstance(error, Fenced):
        return "fenced"
    return "conflict" if isinstance(error, Conflict) else "refused"
