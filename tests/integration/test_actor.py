"""The actor process with a real broker, weight store and verifier; only the generator is scripted."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import Service, free_port
from scripted_peers import Peers, ScriptedGenerator, ScriptedVerifier, event
from tiny_tokenizer import END, assets

from longshore.proto.v1 import generator_pb2, rollout_pb2
from longshore.rollout_queue.rollouts import Delivery
from longshore.rpc.convert_rollout import rollout_from_bytes
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.tasks.rendering import Renderer
from longshore.types import FinishReason, JobRef, Message, Purpose, Rollout, Sampling, Task, Ticket, TicketRef
from longshore.weights.client import CanaryProbe, Tensor, VersionDraft, WeightsClient

WAIT_S = 60.0
RENDERER = Renderer(assets())
STOP = rollout_pb2.FINISH_REASON_STOP


def right(request: generator_pb2.ReplyRequest) -> list[Any]:
    """Answers the sum in the prompt; the weights change after the first token."""
    text = RENDERER.text(list(request.token_ids))
    left, right_ = text.removeprefix("user\n").partition("=")[0].split("+")
    tokens = RENDERER.reply_ids(str(int(left) + int(right_)))
    return [event(tokens[:1], 3), event(tokens[1:], 4, finish=STOP, engine=False)]


def slow(request: generator_pb2.ReplyRequest) -> list[Any]:
    return [event([RENDERER.reply_ids("1")[0]], 3), 600.0]


class Site:
    """One job's processes and its learner's part."""

    def __init__(self, folder: Path, broker_url: str, bench: Any, **settings: object) -> None:
        self.bench = bench
        self.job: JobRef = bench.job
        self.key = SigningKey.generate()
        self.peers = Peers(ScriptedGenerator(right), ScriptedVerifier(1.0), free_port())
        self.weights = Service("weights", folder, store_url=(folder / "store").as_uri())
        job_file = self._write_job(folder)
        self.verifier = Service("verifier", folder, job_file=job_file)
        self.actor = Service(
            "actor",
            folder,
            job_file=job_file,
            broker_url=broker_url,
            generator=self.peers.address,
            verifier=self.verifier.address,
            weights=self.weights.address,
            **{"drain_s": 1.0, **settings},
        )

    def _write_job(self, folder: Path) -> Path:
        spec = {
            "name": "acting",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": {"rollouts_per_actor": 6, "actor_lease_s": 1.5, "max_attempts": 3},
        }
        document = {
            "project": self.job.project,
            "job": self.job.job,
            "spec": spec,
            "learner_public_key": self.key.public_key.hex(),
        }
        path = folder / "job.json"
        path.write_text(JobFile.model_validate(document).model_dump_json())
        return path

    async def publish(self) -> None:
        """The first version: what an actor takes its tokenizer from."""
        client = WeightsClient(self.weights.address, self.job, self.key.public_key)
        draft = VersionDraft(0, 0, 1, None, (CanaryProbe((1, 2), (-0.5,)),), time.time())
        await client.register_key(keep=4, timeout=WAIT_S)
        await client.publish(self.key, draft, [Tensor("w", "float32", (1,), b"\0" * 4)], assets())
        await client.close()

    async def issue(self, *sums: str, first_group: int = 0) -> None:
        await self.bench.tickets.setup()
        epoch = await self.bench.tickets.raise_epoch(1)
        tickets = [
            Ticket(
                TicketRef(self.job, first_group + number, 0),
                1,
                Purpose.TRAIN,
                Task(f"sum-{text}", (Message("user", f"{text}="),), "7"),
                Sampling(1.0, 8),
                epoch,
                time.time(),
            )
            for number, text in enumerate(sums)
        ]
        await self.bench.tickets.issue(epoch, tickets)

    async def deliveries(self, count: int) -> list[Delivery]:
        found: list[Delivery] = []
        async with asyncio.timeout(WAIT_S):
            while len(found) < count:
                found += await self.bench.rollouts.read(count, 500)
        return found

    async def rollouts(self, count: int) -> dict[str, Rollout]:
        found = await self.deliveries(count)
        return {item.ticket_key: rollout_from_bytes(item.payload) for item in found if item.payload is not None}

    async def states(self) -> dict[str, int]:
        counts = await self.bench.ledger.counts()
        assert counts.balanced
        return {state: number for state, number in counts.states.items() if number}

    async def until(self, states: dict[str, int]) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.states() != states:
                assert self.actor.process is not None
                assert self.actor.process.poll() is None, self.actor.tail()
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        for service in (self.actor, self.verifier, self.weights):
            await asyncio.to_thread(service.stop)
        await self.peers.stop()


@pytest.fixture
async def site(tmp_path: Path, broker_url: str, redis: Any, make_bench: Any) -> AsyncIterator[Site]:
    made = Site(tmp_path, broker_url, make_bench(redis, JobRef("default", f"job-{uuid.uuid4().hex[:8]}")))
    await made.peers.start()
    for service in (made.weights, made.verifier, made.actor):
        service.start()
    yield made
    await made.stop()


async def test_from_ticket_to_rollout_and_through_every_death(site: Site) -> None:
    await site.issue("3+4", "2+2")
    await site.publish()
    made = await site.rollouts(2)
    good, bad = made["0.0"], made["1.0"]
    prompt = RENDERER.prompt_ids([Message("user", "3+4=")])
    assert list(good.segments[0].token_ids) == [*prompt, *RENDERER.reply_ids("7")]
    assert [span.length for span in good.segments[0].spans] == [len(prompt), 1, 1]
    assert (good.min_version, good.max_version, good.finish) == (3, 4, FinishReason.STOP)
    assert good.sampling == (Sampling(1.0, 8, (END,)),)
    assert good.verdict is not None
    assert bad.verdict is not None
    assert (good.verdict.reward, bad.verdict.reward, good.verdict.verifier) == (1.0, 0.0, "exact-match@1")
    assert (good.actor, good.site, good.attempt) == ("actor-0", "home", 1)

    # The generator goes away and comes back: rollouts in progress are drawn again.
    await site.peers.stop()
    await site.issue("3+4", "1+1", first_group=10)
    await site.until({"delivered": 2, "running": 2})
    await site.peers.start()
    assert set(await site.rollouts(2)) == {"10.0", "11.0"}

    # The verifier is killed and restarted.
    site.verifier.kill()
    await site.issue("3+4", first_group=20)
    await site.until({"delivered": 4, "running": 1})
    site.verifier.start()
    (scored,) = (await site.rollouts(1)).values()
    assert scored.verdict is not None
    assert scored.attempt == 1

    # The actor itself is killed in mid-reply; its successor takes the lease over.
    site.peers.generator.scripts = [slow]
    site.peers.generator.asked.clear()
    await site.issue("3+4", first_group=30)
    async with asyncio.timeout(WAIT_S):
        await site.peers.generator.asked.wait()
    site.actor.kill()
    site.peers.generator.scripts = [right]
    site.actor.start()
    (taken,) = (await site.rollouts(1)).values()
    assert taken.attempt == 2
    assert await site.states() == {"delivered": 6}


async def test_a_task_that_cannot_be_attempted_ends_with_its_reason(site: Site) -> None:
    site.peers.generator.scripts = [[grpc.StatusCode.INVALID_ARGUMENT]]
    await site.publish()
    await site.issue("3+4")
    (notice,) = await site.deliveries(1)
    assert (notice.payload, notice.final_reason) == (None, "prompt")


async def test_sigterm_gives_unfinished_work_back(site: Site) -> None:
    site.peers.generator.scripts = [slow]
    await site.publish()
    await site.issue("3+4", "1+1")
    await site.until({"running": 2})
    assert site.actor.process is not None
    site.actor.process.terminate()
    assert await asyncio.to_thread(site.actor.wait, 20) == 0
    assert await site.states() == {"queued": 2}


async def test_sigterm_while_it_waits_for_the_first_version(site: Site) -> None:
    await asyncio.to_thread(site.actor.wait_serving)
    assert site.actor.process is not None
    site.actor.process.terminate()
    assert await asyncio.to_thread(site.actor.wait, 20) == 0
