"""The generator process: Generate over gRPC, drawn by one engine that follows the job's newest policy version."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog
import torch

from longshore.errors import IntegrityError, Rejected, Unavailable
from longshore.generator.calls import Call, Calls
from longshore.generator.config import GeneratorSettings
from longshore.generator.engine import (
    Engine,
    EngineRequest,
    Failure,
    QueueFull,
    RequestFailed,
    TokensDrawn,
    check_length,
)
from longshore.generator.follower import Follower
from longshore.generator.making import make_engine
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, rollout_pb2
from longshore.rpc import convert
from longshore.rpc.convert_rollout import engine_to_proto
from longshore.rpc.process import run_process
from longshore.rpc.rollout_checks import MAX_NAME_CHARACTERS
from longshore.rpc.server import RpcServer, rpc_method, rpc_stream
from longshore.settings import JobFile
from longshore.types import JobRef, VersionConstraint
from longshore.weights.client import Copies, WeightsClient

if TYPE_CHECKING:
    from longshore.generator.openai_http.serving import OpenAiServer

SERVICE = "longshore.proto.v1.GeneratorService"

# The one that is served, the one that is staged, and one that has come meanwhile; they share what did not change.
HELD_VERSIONS = 3
# A prompt of a million tokens has four.
MAX_REQUEST_BYTES = 16 * 1024 * 1024

_CODES = {
    Failure.VERSION: grpc.StatusCode.FAILED_PRECONDITION,
    Failure.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Failure.REFUSED: grpc.StatusCode.INVALID_ARGUMENT,
}
_Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()


class GeneratorService(generator_pb2_grpc.GeneratorServiceServicer):
    """Translates Generate for the engine and the engine's events for the callers."""

    def __init__(self, job: JobRef, calls: Calls, max_request_s: float) -> None:
        self._job = job
        self._calls = calls
        self._max_request_s = max_request_s
        # Ids of the callers' own, of requests that run.
        self._names: set[str] = set()

    @rpc_stream
    async def Generate(  # noqa: N802 - the name is the contract's
        self, request: generator_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        engine = self._calls.proven()
        wanted = self._request(engine, request, context)
        try:
            await self._calls.have_resident(wanted)
        except (IntegrityError, Unavailable) as error:
            # Nothing is wrong with the request, nor with this generator for others.
            await context.abort(grpc.StatusCode.ABORTED, f"the pinned version cannot be had here now: {error}")
        if request.request_id in self._names:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"request {request.request_id!r} is running")
        try:
            call = self._open(wanted, request.request_id, context)
        except QueueFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        first = True
        while True:
            event = await call.next()
            if isinstance(event, RequestFailed):
                await context.abort(_CODES[event.failure], event.message)
                return
            response = _response(event)
            if first:
                response.engine.CopyFrom(engine_to_proto(engine.fingerprint))
                first = False
            yield response
            if event.finish is not None:
                return

    @rpc_method
    async def GetStatus(  # noqa: N802 - the name is the contract's
        self, request: generator_pb2.GetStatusRequest, context: _Context
    ) -> generator_pb2.GetStatusResponse:
        self._check_job(request.job)
        engine = self._calls.engine
        if engine is None:
            return generator_pb2.GetStatusResponse()
        status = engine.status()
        return generator_pb2.GetStatusResponse(
            policy_version=status.version,
            running_requests=status.running,
            waiting_requests=status.waiting,
            max_running_requests=engine.limits.slots,
            kv_used_ratio=status.kv_used_ratio,
            engine=engine_to_proto(engine.fingerprint),
            resident_versions=() if status.version is None else (status.version, *status.beside),
        )

    def _open(self, request: EngineRequest, name: str, context: _Context) -> Call:
        """Submits a request that lives as long as its gRPC call."""
        opened = contextlib.ExitStack()
        call = opened.enter_context(self._calls.open(request))
        self._names.add(name)

        def close(_: _Context) -> None:
            self._names.remove(name)
            opened.close()

        context.add_done_callback(close)  # type: ignore[arg-type] # the stub asks for a class, not a callable
        return call

    def _request(self, engine: Engine, request: generator_pb2.GenerateRequest, context: _Context) -> EngineRequest:
        self._check_job(request.job)
        for name, text in (("request_id", request.request_id), ("prefix_key", request.prefix_key)):
            if len(text) > MAX_NAME_CHARACTERS:
                raise Rejected("malformed", f"{name} has {len(text)} characters, at most {MAX_NAME_CHARACTERS}")
        if not request.request_id:
            raise Rejected("malformed", "request_id must not be empty")
        # Before the ids become Python's integers, which take ten times the room.
        check_length(len(request.token_ids), engine.limits)
        if request.attachments:
            raise Rejected("attachments", "this engine takes token ids alone")
        left = context.time_remaining()
        seconds = self._max_request_s if left is None else min(left, self._max_request_s)
        version = convert.version_from_proto(request.version) if request.HasField("version") else VersionConstraint()
        return EngineRequest(
            request_id=self._calls.new_id(),
            token_ids=tuple(request.token_ids),
            sampling=convert.sampling_from_proto(request.sampling),
            deadline=time.monotonic() + seconds,
            version=version,
        )

    def _check_job(self, job: Any) -> None:
        if convert.job_from_proto(job) != self._job:
            raise Rejected("job", f"this generator serves {self._job}")


def _response(event: TokensDrawn) -> generator_pb2.GenerateResponse:
    return generator_pb2.GenerateResponse(
        token_ids=event.token_ids,
        logprobs=event.logprobs,
        policy_version=event.version,
        kv=convert.KV[event.kv],
        kv_min_version=event.kv_min_version,
        finish=rollout_pb2.FINISH_REASON_UNSPECIFIED if event.finish is None else convert.FINISH[event.finish],
    )


class _EngineHost:
    """Makes the process's engine when the follower asks for it, and tells when its thread has ended."""

    def __init__(self, settings: GeneratorSettings, job: JobFile, calls: Calls) -> None:
        self._settings = settings
        self._job = job
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._engine: Engine | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def make(self, config: bytes) -> Engine:
        """Called on a worker thread. Raises ConfigError when the engine cannot run the model."""
        engine = make_engine(self._settings, self._job, config, self._calls.deliver)
        self._engine = engine
        engine.ended.add_done_callback(lambda ended: self._loop.call_soon_threadsafe(self._end, ended.exception()))
        log.info("engine made", engine=engine.fingerprint.engine, config=engine.fingerprint.config_digest)
        return engine

    async def close(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


async def serve(settings: GeneratorSettings, stop: asyncio.Event) -> None:
    """Runs until `stop`, then lets running replies finish. Raises what ended the engine or the follower."""
    job = settings.load_job()
    torch.set_num_threads(job.spec.resources.threads)
    server = RpcServer(settings.listen, MAX_REQUEST_BYTES)
    calls = Calls(job.ref)
    service = GeneratorService(job.ref, calls, settings.max_request_s)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(service, server.server)
    copies: Copies[int] = Copies(HELD_VERSIONS, settings.held_mb * 1024 * 1024)
    client = WeightsClient(settings.weights, job.ref, bytes.fromhex(job.learner_public_key), copies)
    host = _EngineHost(settings, job, calls)
    http = _openai(settings, job, calls, stop)

    async def on_version(engine: Engine) -> None:
        if calls.engine is None:
            if http is not None:
                await http.read(follower.assets)
            calls.engine = engine
            await server.set_serving(SERVICE, True)

    follower = Follower(client, host.make, on_version, job.ref, settings.follow)
    calls.keep = follower.keep
    await server.start()
    serving_http = [] if http is None else [asyncio.create_task(http.run())]
    try:
        await _first_to_end(stop, follower, host.ended, *serving_http)
    finally:
        await client.close()
        # Without its engine no reply will finish.
        drain_s = settings.drain_s if stop.is_set() else 0.0
        for serving in [] if stop.is_set() else serving_http:
            serving.cancel()
        await asyncio.gather(server.drain(drain_s), *serving_http, return_exceptions=True)
        await host.close()


def _openai(settings: GeneratorSettings, job: JobFile, calls: Calls, stop: asyncio.Event) -> OpenAiServer | None:
    """The OpenAI-compatible interface, where an address is set for it; what it needs is imported only then."""
    if not settings.openai_listen:
        return None
    from longshore.generator.openai_http.serving import OpenAiServer

    return OpenAiServer(settings, job, calls, stop)


async def _first_to_end(stop: asyncio.Event, follower: Follower, *others: asyncio.Future[None]) -> None:
    """Returns when told to stop; raises what the follower, or a future of the others, ended with (law 9)."""
    stopped, following = asyncio.create_task(stop.wait()), asyncio.create_task(follower.run())
    try:
        waited: list[asyncio.Future[Any]] = [stopped, following, *others]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for ended in waited:
            if ended.done():
                ended.result()
        if not stopped.done():
            raise Unavailable("the follower, the engine or a server ended by itself")
    finally:
        stopped.cancel()
        following.cancel()
        await asyncio.gather(stopped, following, return_exceptions=True)


def main() -> int:
    """Entry of `longshore serve generator`."""
    return run_process("generator", GeneratorSettings.from_environment(), serve)
