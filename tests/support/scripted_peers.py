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
Step = generator_pb2.GenerateResponse | grpc.StatusCode | float


def event(
    tokens: Sequence[int] = (),
    version: int = 0,
    *,
    finish: int = 0,
    engine: bool = True,
    kv: int = rollout_pb2.KV_MARK_RECOMPUTED,
    oldest: int | None = None,
) -> generator_pb2.GenerateResponse:
    """One event of a reply; each token has the log-prob -0.5."""
    return generator_pb2.GenerateResponse(
        token_ids=tokens,
        logprobs=[-0.5] * len(tokens),
        policy_version=version,
        kv=kv,
        kv_min_version=oldest,
        finish=finish,
        engine=ENGINE if engine else None,
    )


class ScriptedGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    """Plays the next script; the last one again and again. A status aborts, a number sleeps that many seconds."""

    def __init__(self, *scripts: Sequence[Step] | Callable[[generator_pb2.GenerateRequest], Sequence[Step]]) -> None:
        self.scripts = list(scripts)
        self.requests: list[generator_pb2.GenerateRequest] = []
        self.asked, self.cancelled = asyncio.Event(), asyncio.Event()
        # What it says of itself.
        self.status = generator_pb2.GetStatusResponse(policy_version=0, max_running_requests=64)

    async def GetStatus(self, request: Any, context: Any) -> generator_pb2.GetStatusResponse:
        return self.status

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.requests.append(request)
        self.asked.set()
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for step in script(request) if callable(script) else script:
                if isinstance(step, grpc.StatusCode):
                    await context.abort(step, f"scripted {step.name}")
                elif isinstance(step, int | float):
                    await asyncio.sleep(step)
                else:
                    yield step
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


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
