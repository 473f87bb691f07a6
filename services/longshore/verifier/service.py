"""The verifier process: Verify over gRPC, scored by a pool of processes of the job's verifier."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import structlog

from longshore.errors import Rejected
from longshore.proto.v1 import verdict_pb2, verifier_pb2, verifier_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.process import run_process
from longshore.rpc.server import RpcServer, rpc_method
from longshore.settings import JobFile
from longshore.tasks.verification import ScoreRequest
from longshore.types import JobRef, Message
from longshore.verifier import metrics
from longshore.verifier.config import VerifierSettings
from longshore.verifier.folders import sweep
from longshore.verifier.pool import PoolLimits, ScoreTimeout, VerifierPool

SERVICE = "longshore.proto.v1.VerifierService"

log = structlog.get_logger()


class VerifierService(verifier_pb2_grpc.VerifierServiceServicer):
    """Translates Verify for the pool."""

    def __init__(self, job: JobRef, pool: VerifierPool) -> None:
        self._job = job
        self._pool = pool
        self._labels = (job.project, job.job)

    @rpc_method
    async def Verify(  # noqa: N802 - the name is the contract's
        self, request: verifier_pb2.VerifyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> verifier_pb2.VerifyResponse:
        outcome = "failed"
        metrics.WAITING.labels(*self._labels).set(self._pool.num_waiting)
        try:
            with metrics.SECONDS.labels(*self._labels).time():
                verdict = await self._pool.score(self._request(request))
            outcome = "scored"
        except ScoreTimeout as error:
            outcome = "timeout"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        finally:
            metrics.SCORES.labels(*self._labels, outcome).inc()
        message = convert.verdict_to_proto(verdict)
        message.role = request.role or verdict_pb2.VERDICT_ROLE_TRAIN
        return verifier_pb2.VerifyResponse(verdict=message)

    def _request(self, request: verifier_pb2.VerifyRequest) -> ScoreRequest:
        if convert.job_from_proto(request.job) != self._job:
            raise Rejected("job", f"this verifier serves {self._job}")
        return ScoreRequest(
            task=convert.task_from_proto(request.task),
            conversation=[Message(item.role, item.content) for item in request.conversation],
            reply=request.reply,
            turn_info=[convert.json_object(text, "turn_info_json") for text in request.turn_info_json],
        )


async def serve(settings: VerifierSettings, stop: asyncio.Event) -> None:
    """Runs until `stop`; raises PluginError when the verifier cannot be loaded."""
    job = settings.load_job()
    if left_behind := await asyncio.to_thread(sweep):
        log.info("removed folders of verifiers that were killed", folders=left_behind)
    restarts = metrics.RESTARTS.labels(job.project, job.job)
    server = RpcServer(settings.listen)
    async with VerifierPool(job.spec.verifier, _limits(settings, job), restarts.inc) as pool:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(VerifierService(job.ref, pool), server.server)
        await server.start()
        announcement = asyncio.create_task(_announce(server, pool))
        try:
            await pool.run(stop)
        finally:
            announcement.cancel()
            await server.drain(settings.drain_s)


async def _announce(server: RpcServer, pool: VerifierPool) -> None:
    await pool.ready.wait()
    await server.set_serving(SERVICE, True)
    log.info("ready")


def _limits(settings: VerifierSettings, job: JobFile) -> PoolLimits:
    return PoolLimits(
        workers=job.spec.resources.verifier_workers,
        max_waiting=settings.max_waiting,
        memory_bytes=settings.worker_memory_mb * 1024 * 1024,
        start_s=settings.worker_start_s,
    )


def main() -> int:
    """Entry of `longshore serve verifier`."""
    return run_process("verifier", VerifierSettings.from_environment(), serve)
