"""The generator process: Generate over gRPC, drawn by one engine that follows the job's newest policy version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
import torch

from longshore.errors import Unavailable
from longshore.generator.calls import Calls
from longshore.generator.config import GeneratorSettings
from longshore.generator.engine import Engine
from longshore.generator.follower import Follower
from longshore.generator.making import make_engine
from longshore.generator.servicer import SERVICE, GeneratorServicer
from longshore.proto.v1 import generator_pb2_grpc
from longshore.rpc.channel import MAX_ASK_BYTES
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer
from longshore.settings import JobFile
from longshore.weights.client import Copies, WeightsClient

if TYPE_CHECKING:
    from longshore.generator.openai_http.serving import OpenAiServer

# The one that is served, the one that is staged, and one that has come meanwhile; they share what did not change.
HELD_VERSIONS = 3

log = structlog.get_logger()


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
    server = RpcServer(settings.listen, MAX_ASK_BYTES)
    calls = Calls(job.ref)
    servicer = GeneratorServicer(job.ref, calls, settings.max_request_s)
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(servicer, server.server)
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
        servicer.drain()
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
