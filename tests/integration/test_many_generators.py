"""One site as the launcher runs it: two real generators, one of which is killed in the middle of the work."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Service
from tiny_llama import canary_logprobs, config_json, published, tiny_model
from tiny_tokenizer import assets

from longshore.launcher.deaths import Rules
from longshore.launcher.plan import Endpoints, JobPaths, plan_job
from longshore.launcher.probe import probe
from longshore.launcher.spec import ProcessState, ProcessStatus
from longshore.launcher.state_dir import write_private
from longshore.launcher.supervisor import Supervisor
from longshore.rpc.convert_rollout import rollout_from_bytes
from longshore.rpc.key_file import digest_line
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef, Message, Purpose, Rollout, Sampling, Task, Ticket, TicketRef
from longshore.weights.client import CanaryProbe, VersionDraft, WeightsClient

WAIT_S = 90.0
UNIT = "job"
CANARY = (1, 2, 3, 4)
# As many as the tiny tokenizer has.
VOCABULARY = 100


class Site:
    """A job's home site without its learner."""

    def __init__(self, folder: Path, broker_url: str, bench: Any) -> None:
        self.bench = bench
        self.job: JobRef = bench.job
        self.key = SigningKey.generate()
        self.weights = Service("weights", folder, store_url=(folder / "store").as_uri())
        spec = {
            "name": "many",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": {"actors": 1, "generators": 2, "generator_slots": 4, "rollouts_per_actor": 8},
        }
        job = JobFile.model_validate(
            {
                "project": self.job.project,
                "job": self.job.job,
                "spec": spec,
                "learner_public_key": self.key.public_key.hex(),
            }
        )
        paths = JobPaths(folder, folder / "no.key")
        paths.job_file.write_text(job.model_dump_json())
        write_private(paths.openai_keys_file, digest_line("test", secrets.token_hex(32)))
        plan = plan_job(job, Endpoints(broker_url, self.weights.address), paths)
        self.specs = [item for item in plan if item.service != "learner"]
        self.supervisor = Supervisor(probe, Rules(first_backoff=0.1))

    async def publish(self) -> None:
        model = tiny_model(0, context=2048, vocabulary=VOCABULARY)
        tensors = published(model, torch.bfloat16)
        draft = VersionDraft(0, 0, 1, None, (CanaryProbe(CANARY, canary_logprobs(model, CANARY)),), time.time())
        client = WeightsClient(self.weights.address, self.job, self.key.public_key)
        await client.register_key(keep=4, timeout=WAIT_S)
        await client.publish(self.key, draft, tensors, {"config.json": config_json(model), **assets()})
        await client.close()

    async def issue(self, first: int, count: int) -> None:
        await self.bench.tickets.setup()
        epoch = await self.bench.tickets.raise_epoch(1)
        task, sampling = Task("t", (Message("user", "3+4="),), "7"), Sampling(1.0, 1500)
        refs = [TicketRef(self.job, first + number, 0) for number in range(count)]
        tickets = [Ticket(ref, 1, Purpose.TRAIN, task, sampling, epoch, time.time()) for ref in refs]
        await self.bench.tickets.issue(epoch, tickets)

    async def rollouts(self, count: int) -> list[Rollout]:
        found: list[Rollout] = []
        async with asyncio.timeout(WAIT_S):
            while len(found) < count:
                for delivery in await self.bench.rollouts.read(count, 500):
                    assert delivery.payload is not None, delivery.final_reason
                    found.append(rollout_from_bytes(delivery.payload))
        return found

    def process(self, name: str) -> ProcessStatus:
        (unit,) = self.supervisor.snapshot()
        return next(item for item in unit.processes if item.name == name)

    async def metric(self, process: str, pattern: str) -> float:
        """0 while the process does not answer, or has no such line."""
        (unit,) = self.supervisor._units.values()
        spec = next(child.spec for child in unit.children if child.spec.name == process)

        def read() -> str:
            url = f"http://{spec.env['LONGSHORE_METRICS_LISTEN']}/metrics"
            try:
                with urllib.request.urlopen(url, timeout=5) as page:
                    return str(page.read().decode())
            except OSError:
                return ""

        found = re.search(rf"^{pattern} (\S+)$", await asyncio.to_thread(read), re.M)
        return float(found[1]) if found else 0.0

    async def until(self, process: str, pattern: str, holds: Callable[[float], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds(await self.metric(process, pattern)):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)


@pytest.fixture
async def site(tmp_path: Path, broker_url: str, redis: Any, make_bench: Any) -> AsyncIterator[Site]:
    made = Site(tmp_path, broker_url, make_bench(redis, JobRef("default", f"job-{uuid.uuid4().hex[:8]}")))
    made.weights.start()
    await made.supervisor.apply(UNIT, made.specs)
    yield made
    made.supervisor.hurry()
    await made.supervisor.close(UNIT)
    await asyncio.to_thread(made.weights.stop)


SERVING = r'longshore_actor_generators\{.*state="serving"\}'
RETRIES = r'longshore_actor_retries_total\{.*peer="generator".*\}'
TOKENS = r"longshore_generator_tokens_total\{.*\}"


async def test_one_of_two_generators_is_killed_and_comes_back(site: Site) -> None:
    await site.publish()
    await site.until("actor-0", SERVING, lambda count: count == 2)
    await site.issue(0, 40)
    early = await site.rollouts(1)
    victim = site.process("generator-1")
    assert victim.state is ProcessState.READY
    os.kill(victim.pid, signal.SIGKILL)
    # The other one goes on with everything: nothing hangs, and no ticket needs another attempt.
    rollouts = early + await site.rollouts(40 - len(early))
    assert len({rollout.ref for rollout in rollouts}) == 40
    assert {rollout.attempt for rollout in rollouts} == {1}
    assert await site.metric("actor-0", RETRIES) >= 1
    # What was killed comes back, proves the version anew, and takes its share again.
    await site.until("actor-0", SERVING, lambda count: count == 2)
    assert (site.process("generator-1").restarts, site.process("generator-0").restarts) == (1, 0)
    before = await site.metric("generator-1", TOKENS)
    await site.issue(100, 20)
    await site.rollouts(20)
    assert await site.metric("generator-1", TOKENS) > before
