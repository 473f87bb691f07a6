"""A generator process over vLLM: follows the real weight store, ends when vLLM does, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc.aio
import psutil
import pytest
import torch
from generator_store import PROMPT, SERVICE, Caller, Code, ReplyFailed, Store, tokens_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import Service
from tiny_llama import reference_logprobs

from longshore.launcher.child import Rules
from longshore.launcher.probe import probe
from longshore.launcher.spec import ProcessSpec, ProcessStatus, Ready, ReadyKind
from longshore.launcher.supervisor import Supervisor

pytestmark = pytest.mark.vllm
START_S = 240.0
END_S = 60.0


async def test_it_serves_what_is_proven_and_is_started_again_when_a_worker_is_killed(tmp_path: Path) -> None:
    store_process = Service("weights", tmp_path, store_url=(tmp_path / "store").as_uri()).start()
    store = Store(tmp_path, store_process.address, generator={"engine": "vllm"})
    settings = Service("generator", tmp_path, job_file=store.job_file, weights=store.weights, cache_mb=64)
    ready = Ready(ReadyKind.GRPC, settings.address)
    spec = ProcessSpec("generator-0", "generator", settings.argv, settings.env, settings.log, ready)
    supervisor = Supervisor(probe, Rules())
    caller = Caller(store.job, settings.address)
    try:
        await store.publish()
        await supervisor.apply("job", [spec])
        await _until_serving(settings.address)
        await _follows(store, caller)
        await _ends_with_its_worker(_process(supervisor).pid, settings.log, caller)
        await _comes_back_and_waits_for_proof(supervisor, settings.address, caller)
    finally:
        await caller.channel.close()
        await supervisor.close("job")
        store_process.stop()


async def _follows(store: Store, caller: Caller) -> None:
    events = await caller.reply()
    assert (events[0].engine.engine, events[0].policy_version) == ("vllm", 0)
    running = asyncio.create_task(caller.reply((1,), tokens=1500))
    await store.publish()
    await caller.until(lambda status: status.policy_version == 1)
    versions = [event.policy_version for event in await running]
    assert sorted(set(versions)) == [0, 1]
    (event,) = await caller.reply()
    expected = reference_logprobs(store.models[1], PROMPT, list(event.token_ids))
    # bfloat16 weights, float32 arithmetic.
    torch.testing.assert_close(torch.tensor(list(event.logprobs)), expected, atol=1e-4, rtol=0)
    await store.publish(canary=(-1.0, -1.0, -1.0))
    await store.publish()
    await caller.until(lambda status: status.policy_version == 3)
    assert len(tokens_of(await caller.reply())) == 6


async def _ends_with_its_worker(pid: int, log: Path, caller: Caller) -> None:
    helpers = psutil.Process(pid).children(recursive=True)
    (worker,) = [helper for helper in helpers if "Worker" in helper.name() or "Worker" in " ".join(helper.cmdline())]
    running = caller.start((1,), tokens=2000)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ReplyFailed) as caught:
        async for _ in running:
            pass
    assert caught.value.code in (Code.UNAVAILABLE, Code.CANCELLED)
    _, alive = await asyncio.to_thread(psutil.wait_procs, helpers, timeout=END_S)
    assert alive == []
    assert "vLLM's engine process has died" in await asyncio.to_thread(log.read_text)


async def _comes_back_and_waits_for_proof(supervisor: Supervisor, address: str, caller: Caller) -> None:
    """Until the new process has proven a version it refuses, as often as it is asked."""
    refusals: set[Code] = set()
    async with asyncio.timeout(START_S):
        while not await _serving(address):
            try:
                await caller.reply()
            except ReplyFailed as error:
                refusals.add(error.code)
            else:
                # It was proven between the two questions.
                assert await _serving(address)
            await asyncio.sleep(0.2)
    assert refusals == {Code.UNAVAILABLE}
    assert (_process(supervisor).restarts, _process(supervisor).exit_code) == (1, 1)
    (event,) = await caller.reply()
    assert event.policy_version == 3


async def _until_serving(address: str) -> None:
    async with asyncio.timeout(START_S):
        while not await _serving(address):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.2)


async def _serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _process(supervisor: Supervisor) -> ProcessStatus:
    (unit,) = supervisor.snapshot()
    (process,) = unit.processes
    return process
