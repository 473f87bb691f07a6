"""WeightsService over one store: between gRPC and `store.py`. Served by the origin, and by a relay for its site.

The store blocks, so every call into it runs in a thread. A payload is spooled, in memory up to 8 MiB and in an
unnamed file beyond, and stored only once it is whole and has been checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from typing import IO, Any

import grpc
import grpc.aio
import structlog

from longshore.errors import Conflict, Fenced, IntegrityError, LongshoreError, Rejected, Unavailable
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.server import rpc_method, rpc_stream
from longshore.types import JobRef
from longshore.weight_store import metrics
from longshore.weight_store.hub import PointerHub
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StorageFull
from longshore.weight_store.planner import path_kind
from longshore.weight_store.store import Admission, VersionTaken, WeightStore
from longshore.weight_store.version import HEAD, PointerState

SERVICE = "longshore.proto.v1.WeightsService"
MAX_CHUNK_BYTES = 1024 * 1024
MAX_HAVE = 64
SPOOL_BYTES = 8 * 1024 * 1024
# One read of the store gives several chunks, because each is a request where the store is remote.
_READ_BYTES = 4 * MAX_CHUNK_BYTES
# A publisher that sends nothing for this long is taken for dead.
_IDLE_S = 60.0

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """WeightsService over one store."""

    def __init__(self, store: WeightStore, spool_folder: str | None) -> None:
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
        job = convert.job_from_proto(request.job)
        await asyncio.to_thread(self._store.register_key, job, request.public_key, request.keep)
        log.info("key registered", job=str(job), keep=request.keep)
        return weights_pb2.RegisterKeyResponse()

    @rpc_method
    async def RotateKey(  # noqa: N802 - the contract's name
        self, request: weights_pb2.RotateKeyRequest, context: Context
    ) -> weights_pb2.RotateKeyResponse:
        await asyncio.to_thread(self._store.rotate_key, request.rotation)
        return weights_pb2.RotateKeyResponse()

    @rpc_method
    async def GetKeys(  # noqa: N802 - the contract's name
        self, request: weights_pb2.GetKeysRequest, context: Context
    ) -> weights_pb2.GetKeysResponse:
        first, rotations = await asyncio.to_thread(self._store.keys, convert.job_from_proto(request.job))
        return weights_pb2.GetKeysResponse(public_key=first, rotations=rotations)

    @rpc_method
    async def Publish(  # noqa: N802 - the contract's name
        self, requests: AsyncIterator[weights_pb2.PublishRequest], context: Context
    ) -> weights_pb2.PublishResponse:
        try:
            existed = await self._publish(requests)
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
        job = convert.job_from_proto(request.job)
        if len(request.have) > MAX_HAVE:
            raise Rejected("have", f"{len(request.have)} versions; at most {MAX_HAVE} may be named")
        manifest, encodings = await asyncio.to_thread(self._store.version, job, key)
        steps = await asyncio.to_thread(self._store.path, job, key, set(request.have), set(request.codecs))
        metrics.PATHS.labels(job.project, job.job, path_kind(steps)).inc()
        path = [weights_pb2.PathStep(version=step.version, encoding=step.encoding) for step in steps or ()]
        return weights_pb2.GetVersionResponse(manifest=manifest, encodings=encodings, path=path)

    @rpc_stream
    async def Fetch(  # noqa: N802 - the contract's name
        self, request: weights_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[weights_pb2.FetchResponse]:
        job = convert.job_from_proto(request.job)
        path, size = await asyncio.to_thread(self._store.find, job, request.sha256)
        if request.offset > size:
            raise Rejected("offset", f"offset {request.offset} is past the end at {size}")
        sent = metrics.SENT_BYTES.labels(job.project, job.job)
        yield weights_pb2.FetchResponse(total_size=size)
        position = request.offset
        while position < size:
            block = await asyncio.to_thread(self._store.read, path, position, _READ_BYTES)
            for start in range(0, len(block), MAX_CHUNK_BYTES):
                yield weights_pb2.FetchResponse(chunk=block[start : start + MAX_CHUNK_BYTES])
            position += len(block)
            sent.inc(len(block))

    @rpc_stream
    async def Watch(  # noqa: N802 - the contract's name
        self, request: weights_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[weights_pb2.WatchResponse]:
        job, name = convert.job_from_proto(request.job), request.pointer or HEAD
        watchers = metrics.WATCHERS.labels(job.project, job.job)
        states = self._hub.watch(job, name, lambda: asyncio.to_thread(self._store.pointer, job, name))
        with watchers.track_inprogress():
            async with contextlib.aclosing(states):
                async for signed in states:
                    yield weights_pb2.WatchResponse(pointer=signed)

    @rpc_method
    async def SetPointer(  # noqa: N802 - the contract's name
        self, request: weights_pb2.SetPointerRequest, context: Context
    ) -> weights_pb2.SetPointerResponse:
        state = await asyncio.to_thread(self._store.set_pointer, request.pointer)
        self._moved(state, request.pointer)
        return weights_pb2.SetPointerResponse()

    @rpc_method
    async def ListVersions(  # noqa: N802 - the contract's name
        self, request: weights_pb2.ListVersionsRequest, context: Context
    ) -> weights_pb2.ListVersionsResponse:
        job = convert.job_from_proto(request.job)
        before = request.before if request.HasField("before") else None
        limit = min(request.limit or 100, 1000)
        numbers = await asyncio.to_thread(self._store.versions, job, request.weight_set, before, limit)
        return weights_pb2.ListVersionsResponse(versions=numbers)

    async def _publish(self, requests: AsyncIterator[weights_pb2.PublishRequest]) -> bool:
        first = await _next(requests)
        if first is None or first.WhichOneof("part") != "header":
            raise Rejected("malformed", "a publish begins with its header")
        # Before any payload is taken: nobody without the job's key fills our disk.
        admission = await asyncio.to_thread(self._store.admit, first.header)
        with contextlib.ExitStack() as closing:
            spool = closing.enter_context(tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=self._spool_folder))
            await _receive(requests, admission, spool)
            # From here on `_settle` closes it.
            closing.pop_all()
        # Goes on when the caller hangs up: what is written must also be told to the watchers.
        settling = asyncio.create_task(self._settle(admission, spool))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        return await asyncio.shield(settling)

    async def _settle(self, admission: Admission, spool: IO[bytes]) -> bool:
        job, result = admission.job, "failed"
        try:
            with spool, metrics.PUBLISH_SECONDS.labels(job.project, job.job).time():
                existed = await asyncio.to_thread(self._store.commit, admission, spool)
            result = "existed" if existed else "published"
        except (Conflict, IntegrityError, Rejected) as error:
            result = _result_of(error)
            raise
        finally:
            metrics.PUBLISHES.labels(job.project, job.job, result).inc()
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


async def _next(requests: AsyncIterator[weights_pb2.PublishRequest]) -> weights_pb2.PublishRequest | None:
    """The next message; None at the end. Raises Unavailable when the sender has gone quiet."""
    try:
        async with asyncio.timeout(_IDLE_S):
            return await anext(requests, None)
    except TimeoutError:
        raise Unavailable(f"nothing was received for {_IDLE_S:.0f} s") from None


async def _receive(requests: AsyncIterator[weights_pb2.PublishRequest], admission: Admission, spool: IO[bytes]) -> None:
    """Spools the payload. Raises Rejected for more of it than was announced."""
    size = admission.encoding.size
    received = metrics.RECEIVED_BYTES.labels(admission.job.project, admission.job.job)
    count = 0
    while (request := await _next(requests)) is not None:
        chunk = request.chunk
        count += len(chunk)
        if not 0 < len(chunk) <= MAX_CHUNK_BYTES or count > size:
            raise Rejected("chunk", f"chunks have 1 to {MAX_CHUNK_BYTES} bytes, {size} in all")
        await asyncio.to_thread(_write, spool, chunk)
        received.inc(len(chunk))


def _write(spool: IO[bytes], chunk: bytes) -> None:
    try:
        spool.write(chunk)
    except OSError as error:
        raise StorageFull(f"no room for a payload: {error.strerror}") from None


def _result_of(error: LongshoreError) -> str:
    if isinstance(error, Fenced):
        return "fenced"
    return "conflict" if isinstance(error, Conflict) else "refused"
