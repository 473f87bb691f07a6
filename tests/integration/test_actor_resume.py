"""Actor processes that are killed in the middle of rollouts, with a real broker and weight store.

The generator and the verifier are scripted, so that every reply that is asked for is counted.
"""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import guessing
import pytest
from plugin_package import write_package
from processes import Service, free_port
from prometheus_client.parser import text_string_to_metric_families
from scripted_peers import Peers, ScriptedGenerator, ScriptedVerifier, event
from tiny_tokenizer import assets

from longshore.proto.v1 import generator_pb2, rollout_pb2
from longshore.rollout_queue.dead_letters import DeadLetters
from longshore.rollout_queue.rollouts import Delivery
from longshore.rollout_queue.spool import Spool, SpoolRecord
from longshore.rpc.convert_rollout import rollout_from_bytes
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.tasks import registry
from longshore.tasks.rendering import Renderer
from longshore.types import FinishReason, JobRef, Message, Purpose, Rollout, Sampling, Task, Ticket, TicketRef
from longshore.weights.client import CanaryProbe, Tensor, VersionDraft, WeightsClient

WAIT_S = 60.0
RENDERER = Renderer(assets())
ENVIRONMENTS = ("forgetful", "replayed", "restored", "deadly")


class Players(ScriptedGenerator):
    """Guesses by the number of the turn, and hangs when asked for the turn `hangs_in`."""

    def __init__(self, *guesses: str) -> None:
        super().__init__(self.answer)
        self.guesses = guesses
        self.hangs_in: int | None = None
        # Replies asked for, by turn.
        self.turns: Counter[int] = Counter()
        self.hangs = asyncio.Event()

    def answer(self, request: generator_pb2.ReplyRequest) -> list[Any]:
        turn = int(request.request_id.split("/")[-2])
        self.turns[turn] += 1
        if turn == self.hangs_in:
            self.hangs.set()
            return [event([RENDERER.reply_ids("1")[0]], 3), 600.0]
        tokens = RENDERER.reply_ids(self.guesses[turn])
        return [
            event(tokens[:1], turn),
            event(tokens[1:], turn + 1, finish=rollout_pb2.FINISH_REASON_STOP, engine=False),
        ]


class Site:
    """One job's actors and its learner's part."""

    def __init__(
        self, folder: Path, weights: Service, bench: Any, broker_url: str, environment: str, **settings: object
    ) -> None:
        self.bench, self.job, self.environment = bench, bench.job, environment
        self.players = Players("1", "9", "2", "7")
        self.verifier = ScriptedVerifier(1.0)
        self.peers = Peers(self.players, self.verifier, free_port())
        self._weights = weights
        self._key = SigningKey.generate()
        job_file = self._write_job(folder)
        self.actors = [
            Service(
                "actor",
                folder,
                **{
                    "name": f"actor-{number}",
                    "job_file": job_file,
                    "broker_url": broker_url,
                    "generator": self.peers.address,
                    "verifier": self.peers.address,
                    "weights": weights.address,
                    "drain_s": 0.5,
                    **settings,
                },
            )
            for number in range(2)
        ]

    def _write_job(self, folder: Path) -> Path:
        spec = {
            "name": "resuming",
            "tasks": {"source": "jsonl"},
            "environment": {"name": self.environment, "max_turns": 9},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": {"rollouts_per_actor": 2, "actor_lease_s": 1.0, "max_attempts": 4},
        }
        document = {
            "project": self.job.project,
            "job": self.job.job,
            "spec": spec,
            "learner_public_key": self._key.public_key.hex(),
        }
        path = folder / "job.json"
        path.write_text(JobFile.model_validate(document).model_dump_json())
        return path

    async def open(self) -> None:
        await self.peers.start()
        client = WeightsClient(self._weights.address, self.job, self._key.public_key)
        draft = VersionDraft(0, 0, 1, None, (CanaryProbe((1, 2), (-0.5,)),), time.time())
        await client.register_key(keep=4, timeout=WAIT_S)
        await client.publish(self._key, draft, [Tensor("w", "float32", (1,), b"\0" * 4)], assets())
        await client.close()
        await self.bench.tickets.setup()
        self.epoch = await self.bench.tickets.raise_epoch(1)

    async def issue(self, group: int = 0) -> None:
        task = Task("game", (Message("user", "?"),), "7", environment=self.environment)
        ref = TicketRef(self.job, group, 0)
        ticket = Ticket(ref, 1, Purpose.TRAIN, task, Sampling(1.0, 8), self.epoch, time.time())
        await self.bench.tickets.issue(self.epoch, [ticket])

    async def delivery(self) -> Delivery:
        async with asyncio.timeout(WAIT_S):
            while not (found := await self.bench.rollouts.read(1, 500)):
                for actor in self.actors:
                    died = actor.process is not None and actor.process.poll() not in (None, 0, -9)
                    assert not died, actor.tail()
        delivery: Delivery = found[0]
        return delivery

    async def rollout(self) -> Rollout:
        payload = (await self.delivery()).payload
        assert payload is not None
        return rollout_from_bytes(payload)

    async def hangs(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.players.hangs.wait()
        self.players.hangs.clear()

    async def killed_in_turn(self, turn: int) -> Service:
        """Starts an actor on a ticket and kills it while a reply is drawn; returns the one that lives."""
        first, second = self.actors
        self.players.hangs_in = turn
        first.start()
        await self.issue()
        await self.hangs()
        first.kill()
        self.players.hangs_in = None
        return second.start()

    async def asks_for_a_score(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.verifier.asked.wait()

    async def stop(self) -> None:
        for actor in self.actors:
            await asyncio.to_thread(actor.stop)
        await self.peers.stop()


def counted(actor: Service) -> dict[str, float]:
    """What an actor has counted, by metric and its label beyond the job's."""
    url = f"http://{actor.metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    return {
        "/".join(
            [sample.name, *(value for name, value in sample.labels.items() if name in ("start", "fate"))]
        ): sample.value
        for family in families
        if family.name.startswith(("longshore_actor_attempts", "longshore_actor_journal"))
        for sample in family.samples
        if sample.name.endswith("_total")
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("weights")
    service = Service("weights", folder, store_url=(folder / "store").as_uri()).start()
    yield service
    service.stop()


@pytest.fixture
def games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the guessing games for the processes of a test."""
    source = Path(guessing.__file__).read_text(encoding="utf-8")
    points = {registry.ENVIRONMENTS: {name: f"ls_games:{name.capitalize()}" for name in ENVIRONMENTS}}
    package = write_package(tmp_path / "site", "ls_games", {"ls_games.py": source}, points)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
async def open_site(
    games: None, tmp_path: Path, broker_url: str, redis: Any, make_bench: Any, weights: Service
) -> AsyncIterator[Callable[..., Any]]:
    made: list[Site] = []

    async def open_site(environment: str, **settings: object) -> Site:
        bench = make_bench(redis, JobRef("default", f"job-{uuid.uuid4().hex[:8]}"))
        made.append(Site(tmp_path, weights, bench, broker_url, environment, **settings))
        await made[-1].open()
        return made[-1]

    yield open_site
    for site in made:
        await site.stop()


@pytest.mark.parametrize("environment", ["replayed", "restored"])
async def test_another_actor_goes_on_at_the_last_turn(open_site: Any, environment: str) -> None:
    site: Site = await open_site(environment)
    second = await site.killed_in_turn(2)
    rollout = await site.rollout()
    # The reply in progress was asked for again, and no other.
    assert site.players.turns == {0: 1, 1: 1, 2: 2, 3: 1}
    assert (rollout.attempt, rollout.actor, rollout.finish) == (2, "actor-1", FinishReason.ENVIRONMENT)
    assert [turn.info for turn in rollout.turns] == [
        {"guess": guess, "round": number} for number, guess in enumerate((1, 9, 2, 7), 1)
    ]
    # Every token still has the version that drew it.
    assert [span.version for span in rollout.sampled_spans] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert rollout.verdict is not None
    assert (await site.bench.ledger.counts()).balanced
    assert counted(second) == {
        "longshore_actor_attempts_total/resumed": 1,
        "longshore_actor_journal_turns_total/saved": 2,
        "longshore_actor_journal_turns_total/lost": 0,
        "longshore_actor_journal_tokens_total/saved": 4,
        "longshore_actor_journal_tokens_total/lost": 0,
    }


async def test_what_cannot_be_brought_back_starts_anew_but_for_its_score(open_site: Any) -> None:
    site: Site = await open_site("forgetful")
    site.verifier.answers = [grpc.StatusCode.UNAVAILABLE]
    second = await site.killed_in_turn(2)
    await site.asks_for_a_score()
    assert site.players.turns == {0: 2, 1: 2, 2: 2, 3: 1}
    found = counted(second)
    assert found["longshore_actor_attempts_total/restarted"] == 1
    assert found["longshore_actor_journal_turns_total/lost"] == 2
    assert found["longshore_actor_journal_tokens_total/lost"] == 4
    # Killed again while the finished episode waits for its score: for that no environment is needed.
    second.kill()
    site.verifier.answers = [1.0]
    site.actors[0].start()
    rollout = await site.rollout()
    assert (rollout.attempt, rollout.actor, len(rollout.turns)) == (3, "actor-0", 4)
    assert site.players.turns == {0: 2, 1: 2, 2: 2, 3: 1}


async def test_sigterm_hands_the_turns_on(open_site: Any) -> None:
    site: Site = await open_site("replayed")
    first, second = site.actors
    site.players.hangs_in = 3
    first.start()
    await site.issue()
    await site.hangs()
    assert first.process is not None
    first.process.terminate()
    assert await asyncio.to_thread(first.wait, 20) == 0
    site.players.hangs_in = None
    second.start()
    assert (await site.rollout()).attempt == 2
    assert site.players.turns == {0: 1, 1: 1, 2: 1, 3: 2}


async def test_a_ticket_that_keeps_killing_actors_ends_at_the_dead_letters(open_site: Any) -> None:
    site: Site = await open_site("deadly")
    site.players.guesses = ("1", "66")
    actor = site.actors[0]
    await site.issue()
    for _ in range(4):
        actor.start()
        assert await asyncio.to_thread(actor.wait, WAIT_S) == -9
    actor.start()
    notice = await site.delivery()
    assert (notice.payload, notice.final_reason, notice.attempt) == (None, "attempts_exhausted", 4)
    # The first turn was drawn once: each attempt went on with the deadly one.
    assert site.players.turns == {0: 1, 1: 4}
    (letter,) = await DeadLetters(site.bench.redis, site.job).list(count=10)
    assert (letter.ticket_key, letter.reason) == ("0.0", "attempts_exhausted")
    # The next ticket is no worse off.
    site.players.guesses = ("7",)
    await site.issue(group=1)
    assert (await site.rollout()).attempt == 1


async def test_an_actor_delivers_what_its_earlier_life_has_spooled(open_site: Any, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    site: Site = await open_site("replayed", spool_dir=folder)
    await site.issue()
    (claim,) = await site.bench.tickets.claim("actor-0", 1, 0)
    spool = await asyncio.to_thread(Spool.open, folder, 2**27)
    await spool.append([SpoolRecord(*claim.fence, b"made before the kill")])
    spool.close()
    site.actors[0].start()
    assert (await site.delivery()).payload == b"made before the kill"
    # What this life makes is spooled, too, and kept.
    site.players.guesses = ("7",)
    await site.issue(group=1)
    assert (await site.rollout()).ref.group_id == 1
    assert site.actors[0].process is not None
    site.actors[0].process.terminate()
    assert await asyncio.to_thread(site.actors[0].wait, 20) == 0
    assert (await asyncio.to_thread(Spool.open, folder, 2**27)).keys() == ["0.0", "1.0"]
