"""The learner's upkeep over a real broker: tickets said again, counts made anew, alarms, wishes, a full broker."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import rollout
from redis.asyncio import Redis

from longshore.config import JobSpec
from longshore.config_curriculum import CurriculumSpec
from longshore.config_model import NewModel
from longshore.errors import Fenced
from longshore.learner import issuer as issuing
from longshore.learner import metrics, upkeep
from longshore.learner.broker_link import BrokerLink
from longshore.learner.checkpoint import load_newest
from longshore.learner.curriculum import Curriculum
from longshore.learner.durability import Durability, covered_by
from longshore.learner.groups import Origin
from longshore.learner.intake import Intake, Limits
from longshore.learner.issue_log import IssueLog
from longshore.learner.issuer import Issuer
from longshore.learner.ledger import Ledger
from longshore.learner.model import _new_model, character_tokenizer
from longshore.learner.parts import Parts
from longshore.learner.progress import Evaluating, Progress
from longshore.learner.trainer import Trainer
from longshore.learner.upkeep import Upkeep
from longshore.rollout_queue.dead_letters import DeadLetters
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.site_leases import SiteLeases
from longshore.rollout_queue.tickets import TicketQueue
from longshore.tasks.source import FirstTasks, TrainCursor, is_heldout
from longshore.types import JobRef, Message, Purpose, Task

GROUPS, SIZE = 2, 2


def task(number: int) -> Task:
    return Task(f"task-{number}", (Message("user", f"Spell {number} backward"),), answer=str(number))


class Numbers:
    version, size = "1", None

    def task(self, ordinal: int) -> Task:
        return task(ordinal)


class Said:
    """A reporter that remembers its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    async def warn(self, message: str) -> None:
        self.warnings.append(message)


class World:
    """The books of one learner incarnation, and what upkeep works with."""

    def __init__(self, client: Redis, job: JobRef, folder: Path, ledger: Ledger | None = None) -> None:
        train = {"steps": 10, "groups_per_step": GROUPS, "group_size": SIZE, "target_staleness": 1}
        self.spec = JobSpec.model_validate(
            {"name": "t", "tasks": {"source": "x", "heldout_fraction": 0.3}, "verifier": {"name": "x"}, "train": train}
        )
        (folder / "learner" / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.folder, self.client, self.job = folder, client, job
        self.said = Said()
        model = NewModel(hidden_size=16, layers=1, heads=2, kv_heads=2, intermediate_size=16, max_context=32)
        torch.set_num_threads(1)
        policy = _new_model(model, character_tokenizer([task(1)]), 0)
        link = BrokerLink(client, job, "home", 5, 3600.0)
        ledger = ledger or Ledger()
        self.parts = Parts(
            job=job,
            spec=self.spec,
            run_dir=folder,
            link=link,
            publisher=None,
            trainer=Trainer(policy, self.spec.train),
            ledger=ledger,
            intake=Intake(link, ledger, job, Limits(64, 32, 16, 1.0)),
            progress=Progress(),
            cursor=TrainCursor(Numbers(), 0.3),
            heldout=[],
            reporter=self.said,
            stop=asyncio.Event(),
            max_unacknowledged=100,
        )
        self.ledger = ledger
        self.issuer = Issuer(self.parts)
        self.durability = Durability(self.parts)
        self.upkeep = Upkeep(self.parts, self.issuer, self.durability)
        self.tickets = TicketQueue(client, job)
        self.rollouts = RolloutQueue(client, job)

    async def look(self) -> None:
        """The upkeep of a few seconds."""
        self.upkeep._looked = self.upkeep._resent = float("-inf")
        await self.upkeep.run()
        await self.durability.settled()

    def gauge(self, books: str) -> float:
        return metrics.IMBALANCE.labels(self.job.project, self.job.job, books)._value.get()

    async def check_equal(self) -> None:
        counts = await self.parts.link.counts()
        assert counts.balanced
        assert counts.issued == self.ledger.issued


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuing, "WISHES_EVERY_S", 0.0)
    monkeypatch.setattr(upkeep, "LOOKS", 1)


@pytest.fixture
def make_world(redis: Redis, tmp_path: Path) -> Callable[..., World]:
    job = JobRef("default", f"upkeep-{uuid.uuid4().hex[:8]}")
    return lambda ledger=None: World(redis, job, tmp_path, ledger)


async def test_an_imbalance_is_told_once_and_again_after_it_was_mended(make_world):
    world = make_world()
    await world.parts.link.open(0)
    await world.issuer.issue()
    await world.look()
    assert (world.gauge("broker"), world.gauge("learner"), world.said.warnings) == (0, 0, [])
    counts = world.issuer._link._ledger._keys.counts
    for _ in range(2):
        await world.client.hincrby(counts, "issued", 3)
        for _ in range(3):
            await world.look()
        assert (world.gauge("broker"), world.gauge("learner")) == (3, 3)
        await world.client.hincrby(counts, "issued", -3)
        await world.look()
    assert len(world.said.warnings) == 2
    assert f"longshore ledger {world.job.job}" in world.said.warnings[0]


async def test_what_the_next_incarnation_issues_again_is_what_was_issued(make_world):
    world = make_world()
    await world.parts.link.open(0)
    await world.issuer.issue()
    await world.durability.checkpoint()
    await world.durability.settled()
    world.ledger.settle_all("trained")
    await world.issuer.issue()
    heldout = [item for item in map(task, range(100)) if is_heldout(item, 0.3)][:3]
    world.parts.heldout.extend(heldout)
    running = Evaluating("step", step=6, version=7)
    await world.issuer.issue_evaluation(running)
    snapshot = load_newest(world.folder / "learner" / "checkpoints")
    again = make_world(Ledger.restore(snapshot.state["ledger"]))
    again.parts.heldout.extend(heldout)
    again.parts.cursor.state = snapshot.state["progress"]["cursor"]
    again.issuer.restore()
    assert (again.ledger.next_group, again.ledger.issued) == (world.ledger.next_group, world.ledger.issued)
    for group_id, group in world.ledger.open.items():
        found = again.ledger.open[group_id]
        assert (found.task, found.purpose, found.size, found.pin) == (group.task, group.purpose, group.size, group.pin)
    assert [group.pin for group in again.ledger.open_groups(Purpose.EVALUATION)] == [7, 7, 7]
    assert again.parts.progress.evaluating == [running]
    assert again.parts.cursor.state == world.parts.cursor.state


async def test_what_a_curriculum_chose_is_issued_again_whatever_is_known_by_then(make_world):
    def with_curriculum(world, success):
        world.parts.cursor = TrainCursor(FirstTasks(Numbers(), 12), 0.3, seed=4)
        for number in range(12):
            world.parts.tasks_known.observe(f"task-{number}", [success(number)])
        spec = CurriculumSpec(least=0.05)
        world.parts.curriculum = Curriculum(world.parts.cursor, world.parts.tasks_known, spec, seed=4)
        return world

    world = with_curriculum(make_world(), lambda number: float(number % 3 == 0))
    await world.parts.link.open(0)
    for _ in range(3):
        await world.issuer.issue()
        for group in list(world.ledger.open.values()):
            world.ledger.abandon(group, "trained")
    again = with_curriculum(make_world(), lambda number: float(number % 3 == 1))
    again.issuer.restore()
    found = [group.task for group in again.ledger.open.values()]
    assert len(found) == again.ledger.next_group == world.ledger.next_group == 12
    records = IssueLog(world.folder / "learner" / "issued.jsonl").after(0)
    assert found == [world.parts.cursor.at(place) for record in records for place in record.positions]
    assert again.parts.cursor.state == world.parts.cursor.state > 12


async def test_a_wish_becomes_a_new_group_ahead_of_the_source_and_only_once(make_world):
    world = make_world()
    await world.parts.link.open(0)
    await world.issuer.issue()
    for claim in await world.tickets.claim("actor-0", 4, 0):
        await world.tickets.reject(claim, "prompt_too_long", "it is")
    heldout = next(item for item in map(task, range(100)) if is_heldout(item, 0.3))
    letters = DeadLetters(world.client, world.job)
    first, second, *_ = await letters.list()
    await letters.requeue(first.letter_id)
    await world.client.xadd(
        letters._keys.requeues, {"task": issuing.convert.task_to_proto(heldout).SerializeToString()}
    )
    await letters.requeue(second.letter_id)
    await world.parts.intake.read(0)
    before = world.ledger.next_group
    await world.issuer.issue()
    assert world.ledger.next_group == before, "there is no room before groups have ended"
    world.ledger.settle_all("trained")
    await world.issuer.issue()
    tasks = [group.task for group in world.ledger.open.values()]
    wished = world.ledger.next_group - before
    assert tasks[:2] == [task_of(first), task_of(second)]
    assert wished == 2 * GROUPS
    assert "held out" in world.said.warnings[0]
    assert await world.parts.link.wishes() == []
    # A wish whose group is on record is not fulfilled again, though the broker still has it.
    await letters.requeue(first.letter_id)
    wish = (await world.parts.link.wishes())[0][0]
    world.parts.progress.newest_wish = wish
    world.ledger.settle_all("trained")
    await world.issuer.issue()
    assert task_of(first) not in [group.task for group in world.ledger.open.values()]


def task_of(letter) -> Task:
    return issuing._task(letter.task)


async def test_an_early_checkpoint_when_too_many_bytes_wait(make_world):
    world = make_world()
    await world.parts.link.open(0)
    await world.issuer.issue()
    group = world.ledger.open[0]
    for index, size in enumerate((60, 41)):
        world.ledger.end_ticket(0, index, "lost", Origin(f"{index}-0", "home", size))
    (endings,) = [world.ledger.settle(group, "trained")]
    world.durability.add(endings[:1])
    await world.upkeep.run()
    assert load_newest(world.folder / "learner" / "checkpoints") is None
    world.durability.add(endings[1:])
    await world.upkeep.run()
    await world.durability.settled()
    snapshot = load_newest(world.folder / "learner" / "checkpoints")
    assert [end.ticket_key for end in covered_by(snapshot)] == ["0.0", "0.1"]
    assert world.durability.waiting_bytes == 0


async def test_a_broker_that_lost_its_tail_has_the_right_counts_again(private_broker, connect, tmp_path):
    client = connect(private_broker.url)
    world = World(client, JobRef("default", "tail"), tmp_path)
    await world.parts.link.open(0)
    await world.upkeep.begin()
    await world.issuer.issue()
    claims = await world.tickets.claim("actor-0", 10, 0)
    assert await world.rollouts.covered([claims[0].ticket.ref.key]) == set()
    await asyncio.sleep(1.1)
    size = private_broker.append_only_file.stat().st_size
    # Lost with the tail: a group that was issued, an end that the broker told of, and one that was acknowledged.
    await world.tickets.reject(claims[0], "prompt_too_long", "x")
    await world.tickets.reject(claims[1], "prompt_too_long", "x")
    await world.parts.intake.read(0)
    world.durability.add(world.ledger.settle(world.ledger.take_empty()[0], "zero_variance"))
    await world.durability.checkpoint()
    await world.durability.settled()
    await world.issuer.issue()
    await world.check_equal()
    told = world.parts.link.incarnation
    private_broker.kill()
    private_broker.lose_tail(size)
    private_broker.start()
    assert (await world.rollouts.covered([claims[0].ticket.ref.key])) is None
    await world.parts.link.read(1, 0)
    world.parts.link._checked = 0.0
    await world.parts.link.read(1, 0)
    assert world.parts.link.lost_tail
    # What was begun when the broker of before had been told everything says nothing of this one.
    world.parts.link.lost_tail = False
    await world.durability.checkpoint(told)
    await world.durability.settled()
    assert (await world.rollouts.covered([claims[0].ticket.ref.key])) is None
    assert world.parts.link.lost_tail
    await world.look()
    await world.check_equal()
    counts = await world.parts.link.counts()
    assert counts.states["prompt_too_long"] == 2
    assert world.said.warnings == []
    assert await world.rollouts.covered([claims[0].ticket.ref.key]) == {claims[0].ticket.ref.key}


async def test_a_repeat_ends_no_ticket_before_its_end_is_durable(make_world):
    """A crash now, and the rollout is needed once more."""
    world = make_world()
    await world.parts.link.open(0)
    await world.upkeep.begin()
    await world.issuer.issue()
    for claim in await world.tickets.claim("actor-0", SIZE, 0):
        await world.rollouts.deliver(claim, b"x")
    for index, delivery in enumerate(await world.parts.link.read(8, 0)):
        world.ledger.receive(rollout(0, index), Origin(delivery.entry_id))
    world.durability.add(world.ledger.settle(world.ledger.open[0], "trained"))
    stream = world.rollouts._keys.rollouts
    ((_, fields), _) = await world.client.xrange(stream)

    async def comes_again() -> dict[str, int]:
        await world.client.xadd(stream, fields)
        assert await world.parts.intake.read(0) == 1
        counts = await world.parts.link.counts()
        return {state: counts.states.get(state, 0) for state in ("delivered", "trained")}

    assert await comes_again() == {"delivered": 2, "trained": 0}
    assert await world.rollouts.covered(["0.0"]) == set()
    # A flood of them makes a checkpoint due before its turn.
    world.parts.max_unacknowledged = 10 * len(fields[b"payload"])
    while not world.durability.overdue:
        await comes_again()
    await world.upkeep.run()
    await world.durability.settled()
    assert await world.rollouts.covered(["0.0", "0.1"]) == {"0.0", "0.1"}
    assert await world.client.xlen(stream) == 0
    assert await comes_again() == {"delivered": 0, "trained": 2}
    assert await world.client.xlen(stream) == 0
    await world.check_equal()
    assert world.ledger.known_at_broker == {("home", "trained"): 2}


async def test_a_superseded_learner_writes_no_checkpoint(make_world):
    old, new = make_world(), make_world()
    await old.parts.link.open(0)
    await new.parts.link.open(0)
    await old.durability.checkpoint()
    with pytest.raises(Fenced):
        await old.durability.settled()
    assert load_newest(old.folder / "learner" / "checkpoints") is None
    await new.durability.checkpoint()
    await new.durability.settled()
    assert load_newest(old.folder / "learner" / "checkpoints") is not None


async def test_site_leases_run_out_as_the_job_says(redis, make_bench):
    bench = make_bench(redis)
    link = BrokerLink(bench.redis, bench.job, "home", 9, 0.001)
    patient = BrokerLink(bench.redis, bench.job, "home", 9, 3600.0)
    await bench.issued(1)
    for attempt in range(1, 7):
        (claim,) = await SiteLeases(bench.redis, bench.job, "west", max_attempts=9).lease(1)
        assert claim.attempt == attempt
        await asyncio.sleep(0.002)
        assert await patient.expire_site_leases() == 0
        assert await link.expire_site_leases() == 1
        assert await bench.states() == {"queued": 1}


async def test_a_full_broker_takes_its_tickets_later(private_broker, connect, tmp_path):
    client = connect(private_broker.url, patience_s=1.0)
    world = World(client, JobRef("default", "full"), tmp_path)
    await world.parts.link.open(0)
    await world.upkeep.begin()
    await client.config_set("maxmemory", 1)
    await world.issuer.issue()
    await world.parts.link.publish({"type": "warning", "message": "waits too"})
    assert world.ledger.issued == 2 * GROUPS * SIZE
    assert not world.issuer.all_sent
    await client.config_set("maxmemory", 0)
    await world.look()
    assert world.issuer.all_sent
    await world.check_equal()
    await world.parts.link.publish({"type": "phase"})
    events = [event["type"] for _, event in await world.parts.link._channel.read("0", 10, 0)]
    assert events == ["warning", "phase"]
    assert json.dumps(world.ledger.state())
