"""A generator and a verifier of a test's own making, served over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from longshore.proto.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    rollout_pb2,
    verdict_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)

SERVICE = "longshore.proto.v1.GeneratorService"
ENGINE = rollout_pb2.EngineFingerprint(engine="scripted", engine_version="1", dtype="float32")
Step = generator_pb2.ReplyEvent | grpc.StatusCode | float


def event(
    tokens: Sequence[int] = (),
    version: int = 0,
    *,
    finish: int = 0,
    engine: bool = True,
    kv: int = rollout_pb2.KV_MARK_RECOMPUTED,
    oldest: int | None = None,
) -> generator_pb2.ReplyEvent:
    """One event of a reply; each token has the log-prob -0.5."""
    return generator_pb2.ReplyEvent(
        token_ids=tokens,
        logprobs=[-0.5] * len(tokens),
        policy_version=version,
        kv=kv,
        kv_min_version=oldest,
        finish=finish,
        engine=ENGINE if engine else None,
    )


class ScriptedGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    """Plays the next script to each request; the last one again and again. A status ends the request, a number sleeps
    that many seconds. A script that ends before its reply ends the stream."""

    def __init__(self, *scripts: Sequence[Step] | Callable[[generator_pb2.ReplyRequest], Sequence[Step]]) -> None:
        self.scripts = list(scripts)
        self.requests: list[generator_pb2.ReplyRequest] = []
        # Of each message.
        self.jobs: list[Any] = []
        self.streams = 0
        self.asked, self.cancelled = asyncio.Event(), asyncio.Event()
        # What it says of itself.
        self.status = generator_pb2.GetStatusResponse(policy_version=0, max_running_requests=64)

    async def GetStatus(self, request: Any, context: Any) -> generator_pb2.GetStatusResponse:
        return self.status

    async def Generate(self, messages: AsyncIterator[generator_pb2.GenerateRequest], context: Any) -> None:
        self.streams += 1
        stream = _Stream(self, context)
        tasks = [asyncio.create_task(stream.read(messages)), asyncio.create_task(stream.write())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, *stream.playing.values()):
                task.cancel()


class _Stream:
    """One actor's."""

    def __init__(self, generator: ScriptedGenerator, context: Any) -> None:
        self.playing: dict[int, asyncio.Task[None]] = {}
        self._generator = generator
        self._context = context
        # None: the stream ends.
        self._events: asyncio.Queue[generator_pb2.ReplyEvent | None] = asyncio.Queue()

    async def read(self, messages: AsyncIterator[generator_pb2.GenerateRequest]) -> None:
        generator = self._generator
        async for message in messages:
            generator.jobs.append(message.job)
            for number in message.cancelled:
                if number in self.playing:
                    self.playing[number].cancel()
            for request in message.requests:
                generator.requests.append(request)
                generator.asked.set()
                script = generator.scripts.pop(0) if len(generator.scripts) > 1 else generator.scripts[0]
                self.playing[request.call] = asyncio.create_task(self._play(request, script))

    async def write(self) -> None:
        while (told := await self._events.get()) is not None:
            await self._context.write(generator_pb2.GenerateResponse(events=[told]))

    async def _play(self, request: generator_pb2.ReplyRequest, script: Any) -> None:
        told = generator_pb2.ReplyEvent()
        try:
            for step in script(request) if callable(script) else script:
                if isinstance(step, int | float):
                    await asyncio.sleep(step)
                    continue
                told = generator_pb2.ReplyEvent()
                if isinstance(step, grpc.StatusCode):
                    told.failure.code, told.failure.message = step.value[0], f"scripted {step.name}"
                else:
                    told.CopyFrom(step)
                told.call = request.call
                self._events.put_nowait(told)
        except asyncio.CancelledError:
            self._generator.cancelled.set()
            raise
        if not told.finish and not told.HasField("failure"):
            self._events.put_nowait(None)


class ScriptedVerifier(verifier_pb2_grpc.VerifierServiceServicer):
    """Answers with the next status or reward; the last one again and again. None: no verdict yet."""

    def __init__(self, *answers: grpc.StatusCode | float | None) -> None:
        self.answers = list(answers)
        self.requests: list[verifier_pb2.VerifyRequest] = []
        self.asked = asyncio.Event()

    async def Verify(self, request: Any, context: Any) -> verifier_pb2.VerifyResponse:
        self.requests.append(request)
        self.asked.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, grpc.StatusCode):
            await context.abort(answer, f"scripted {answer.name}")
        if answer is None:
            return verifier_pb2.VerifyResponse()
        verdict = verdict_pb2.Verdict(reward=answer, verifier="scripted@1", revision=1, role=request.role)
        return verifier_pb2.VerifyResponse(verdict=verdict)


class Peers:
    """A server on a fixed loopback port that can go away and come back."""

    def __init__(self, generator: ScriptedGenerator, verifier: ScriptedVerifier, port: int) -> None:
        self.generator = generator
        self.verifier = verifier
        self.address = f"127.0.0.1:{port}"
        self._server: grpc.aio.Server | None = None
        self._health: Any = None

    async def serves(self, serving: bool) -> None:
        """What health says of the generator."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(SERVICE, status.SERVING if serving else status.NOT_SERVING)

    async def start(self) -> None:
        self._server = grpc.aio.server()
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(self.generator, self._server)
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self.verifier, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self.serves(True)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
