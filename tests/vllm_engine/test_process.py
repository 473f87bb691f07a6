"""A generator process over vLLM: follows the real weight store, and ends when vLLM does."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc.aio
import psutil
import pytest
import torch
from generator_store import PROMPT, SERVICE, Caller, Code, Store, tokens_of
from processes import Service
from tiny_llama import reference_logprobs

pytestmark = pytest.mark.vllm
START_S = 240.0
END_S = 60.0


async def test_it_serves_what_is_proven_and_ends_when_a_worker_is_killed(tmp_path: Path) -> None:
    store_process = Service("weights", tmp_path, store_url=(tmp_path / "store").as_uri()).start()
    store = Store(tmp_path, store_process.address, generator={"engine": "vllm"})
    generator = Service("generator", tmp_path, job_file=store.job_file, weights=store.weights, cache_mb=64).start()
    try:
        await store.publish()
        await asyncio.to_thread(generator.wait_serving, SERVICE, START_S)
        caller = Caller(store.job, generator.address)
        await _follows(store, caller)
        await _ends_with_its_worker(generator, caller)
        await caller.channel.close()
    finally:
        generator.stop()
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


async def _ends_with_its_worker(generator: Service, caller: Caller) -> None:
    assert generator.process is not None
    helpers = psutil.Process(generator.process.pid).children(recursive=True)
    (worker,) = [helper for helper in helpers if "Worker" in helper.name() or "Worker" in " ".join(helper.cmdline())]
    running = caller.start((1,), tokens=2000)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in running:
            pass
    assert caught.value.code() in (Code.UNAVAILABLE, Code.CANCELLED)
    assert await asyncio.to_thread(generator.process.wait, END_S) == 1
    assert "vLLM's engine process has died" in generator.log.read_text()
    _, alive = psutil.wait_procs(helpers, timeout=END_S)
    assert alive == []
