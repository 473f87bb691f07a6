"""What becomes of spooled rollouts: a real spool, a real broker that is killed and loses its tail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longshore.actor import sweeper as sweeper_module
from longshore.actor.sweeper import Sweeper
from longshore.errors import IntegrityError, LongshoreError, Rejected, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.broker import BrokerFull
from longshore.rollout_queue.rollouts import End
from longshore.rollout_queue.spool import Spool, SpoolRecord
from longshore.rollout_queue.tickets import Claim

WAIT_S = 30.0


class World:
    """A spool that an actor left, its sweeper, and the learner's part."""

    def __init__(self, bench: Any, folder: Path) -> None:
        self.bench = bench
        self.seen: Counter[str] = Counter()
        self.holds = (0, 0)
        self.redelivered_one = asyncio.Event()
        self.spool = Spool.open(folder, 1_000_000)
        self.sweeper = Sweeper(bench.job, self.spool, bench.rollouts, partial(broker.incarnation, bench.redis), self)

    def spool_holds(self, records: int, size: int) -> None:
        self.holds = (records, size)

    def redelivered(self, outcome: str) -> None:
        self.seen[outcome] += 1
        self.redelivered_one.set()

    async def claims(self, count: int) -> list[Claim]:
        self.epoch = await self.bench.issued(count)
        found: list[Claim] = await self.bench.tickets.claim("actor-0", count, 0)
        return found

    async def spooled(self, claims: list[Claim], *, delivered: bool) -> None:
        records = [SpoolRecord(*claim.fence, f"rollout {claim.fence[0]}".encode()) for claim in claims]
        await self.spool.append(records)
        for claim, record in zip(claims, records, strict=True):
            if delivered:
                assert await self.bench.rollouts.deliver(claim, record.payload)

    async def trained(self, count: int) -> None:
        """The learner reads, trains, writes its checkpoint and acknowledges."""
        found = await self.bench.rollouts.read(count, 1000)
        assert len(found) == count
        await self.bench.rollouts.acknowledge(
            self.epoch, [End(item.entry_id, item.ticket_key, "trained") for item in found]
        )


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[Callable[[Any], World]]:
    made: list[World] = []

    def make(bench: Any) -> World:
        made.append(World(bench, tmp_path))
        return made[-1]

    yield make
    for world in made:
        world.spool.close()


@pytest.fixture
async def world(bench: Any, make_world: Callable[[Any], World]) -> World:
    return make_world(bench)


async def test_what_an_earlier_life_left_is_delivered_and_kept_until_it_is_covered(world: World) -> None:
    claims = await world.claims(200)
    await world.spooled(claims[:100], delivered=True)
    await world.spooled(claims[100:], delivered=False)
    await world.sweeper.sweep()
    assert world.seen == {"repeated": 100, "delivered": 100}
    assert await world.bench.states() == {"delivered": 200}
    # Until the learner has reconciled nobody may conclude anything from what the broker does not know.
    await world.trained(150)
    await world.sweeper.sweep()
    assert len(world.spool.keys()) == 200
    await world.bench.rollouts.reconcile(world.epoch, await broker.incarnation(world.bench.redis), None)
    await world.sweeper.sweep()
    assert len(world.spool.keys()) == 50
    await world.trained(50)
    await world.sweeper.sweep()
    assert world.spool.keys() == []
    await world.sweeper.sweep()
    assert world.holds[0] == 0
    assert world.seen == {"repeated": 100, "delivered": 100}


async def test_a_broker_that_lost_its_tail_gets_everything_again(
    private_broker: Any, connect: Callable[..., Any], make_bench: Any, make_world: Callable[[Any], World]
) -> None:
    bench = make_bench(connect(private_broker.url))
    world = make_world(bench)
    claims = await world.claims(3)
    await bench.rollouts.reconcile(world.epoch, await broker.incarnation(bench.redis), None)
    await world.spooled(claims[:1], delivered=True)
    await world.sweeper.sweep()
    await asyncio.sleep(1.2)
    size = private_broker.append_only_file.stat().st_size
    # From here on all is lost: a delivery, a new ticket with its attempt and its delivery.
    await world.spooled(claims[1:2], delivered=True)
    await bench.tickets.issue(world.epoch, [bench.ticket(9, 0)])
    late = await bench.tickets.claim("actor-0", 1, 0)
    await world.spooled(late, delivered=True)
    await world.sweeper.sweep()
    await asyncio.sleep(1.2)
    private_broker.kill()
    private_broker.lose_tail(size)
    private_broker.start()

    world.seen.clear()
    await world.sweeper.sweep()
    assert world.seen == {"repeated": 1, "delivered": 1}
    # The broker does not know the late ticket; that does not mean that it has ended.
    await world.sweeper.sweep()
    assert late[0].fence[0] in world.spool
    await bench.tickets.issue(world.epoch, [*bench.some(3), bench.ticket(9, 0)])
    await bench.rollouts.reconcile(world.epoch, await broker.incarnation(bench.redis), None)
    await world.sweeper.sweep()
    assert world.seen == {"repeated": 1, "delivered": 2}
    assert await bench.states() == {"delivered": 3, "running": 1}
    await world.trained(3)
    await world.sweeper.sweep()
    assert world.spool.keys() == []


async def test_a_rollout_that_another_attempt_made_useless_is_not_sent_for_ever(world: World) -> None:
    (claim,) = await world.claims(1)
    await world.spooled([claim], delivered=False)
    await world.bench.tickets.take_over("actor-1", 1, 0)
    await world.sweeper.sweep()
    await world.sweeper.sweep()
    assert world.seen == {}
    await world.bench.rollouts.reconcile(world.epoch, await broker.incarnation(world.bench.redis), None)
    for _ in range(3):
        await world.sweeper.sweep()
    assert world.seen == {"fenced": 1}
    assert world.spool.keys() == [claim.fence[0]]


async def test_what_cannot_be_delivered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = await world.claims(4)
    await world.spooled(claims, delivered=False)
    load, deliver_many = world.spool.load, world.bench.rollouts.deliver_many
    damaged, refused, full, good = (claim.fence[0] for claim in claims)

    def read(key: str) -> SpoolRecord:
        if key == damaged:
            raise IntegrityError("other bytes")
        return load(key)

    async def deliver(rollouts: list[Any]) -> list[bool | LongshoreError]:
        outcomes = await deliver_many(rollouts)
        scripted = {refused: Rejected("oversized", "too large"), full: BrokerFull("full")}
        keys = [claim.fence[0] for claim, _, _ in rollouts]
        return [scripted.get(key, outcome) for key, outcome in zip(keys, outcomes, strict=True)]

    monkeypatch.setattr(world.spool, "load", read)
    monkeypatch.setattr(world.bench.rollouts, "deliver_many", deliver)
    with pytest.raises(Unavailable, match="full"):
        await world.sweeper.sweep()
    assert world.seen == {"lost": 1, "rejected": 1, "delivered": 1}
    assert world.spool.keys() == [full, good]
    monkeypatch.setattr(world.bench.rollouts, "deliver_many", deliver_many)
    await world.sweeper.sweep()
    assert world.seen["repeated"] == 1


async def test_it_goes_on_while_the_broker_is_away(
    private_broker: Any,
    connect: Callable[..., Any],
    make_bench: Any,
    make_world: Callable[[Any], World],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweeper_module, "SWEEP_S", 0.05)
    bench = make_bench(connect(private_broker.url, patience_s=0.1))
    world = make_world(bench)
    claims = await world.claims(1)
    # The append-only file is flushed once a second.
    await asyncio.sleep(1.2)
    private_broker.kill()
    await world.spooled(claims, delivered=False)
    task = asyncio.create_task(world.sweeper.run())
    await asyncio.sleep(0.5)
    assert not task.done()
    private_broker.start()
    async with asyncio.timeout(WAIT_S):
        await world.redelivered_one.wait()
    assert world.seen == {"delivered": 1}
    task.cancel()
