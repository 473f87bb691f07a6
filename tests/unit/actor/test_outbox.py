"""Handing in on a real broker, with a real spool whose disk can fail."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from longshore.actor import outbox as outbox_module
from longshore.actor import retry
from longshore.actor.outbox import Finished, Outbox, SpoolPlace
from longshore.errors import Fenced, Rejected, Unavailable
from longshore.rollout_queue.broker import BrokerFull, BrokerLost
from longshore.rollout_queue.spool import Spool
from longshore.rollout_queue.spool_segments import RealDisk
from longshore.rollout_queue.tickets import Claim

MAX_BYTES = 100_000


class Disk(RealDisk):
    """Fails with `error`, if there is one."""

    def __init__(self) -> None:
        self.error: int | None = None

    def write(self, file: int, data: memoryview) -> int:
        if self.error is not None:
            raise OSError(self.error, "scripted")
        return super().write(file, data)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class World:
    """An outbox, and a broker that fails as it is told before it answers."""

    def __init__(self, bench: Any, folder: Path) -> None:
        self.bench = bench
        self.disk = Disk()
        self.spool = Spool.open(folder, MAX_BYTES, disk=self.disk)
        self.seen: Counter[str] = Counter()
        self.failures: list[Exception] = []
        self.outbox = Outbox(self, SpoolPlace(self.spool, folder), 0.3, self)
        self.spooled_before_delivery: list[bool] = []

    def not_spooled(self) -> None:
        self.seen["not spooled"] += 1

    def held(self) -> None:
        self.seen["held"] += 1

    async def deliver(self, claim: Claim, rollout: bytes, awaiting_verdict: bool = False) -> bool:
        self.spooled_before_delivery.append(claim.ticket.ref.key in self.spool)
        if self.failures:
            raise self.failures.pop(0)
        return bool(await self.bench.rollouts.deliver(claim, rollout, awaiting_verdict))

    async def claims(self, count: int) -> list[Claim]:
        await self.bench.issued(count)
        found: list[Claim] = await self.bench.tickets.claim("actor-0", count, 0)
        return found


@pytest.fixture
async def world(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(outbox_module, "_FIRST_HOLD_S", 0.005)
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
    made = World(bench, tmp_path)
    yield made
    made.spool.close()


async def test_a_rollout_is_on_the_disk_before_it_is_delivered_and_afterwards(world: World) -> None:
    first, second = await world.claims(2)
    await world.outbox.hand_in(first, Finished(b"one"))
    await world.outbox.hand_in(second, Finished(b"two", awaiting_verdict=True))
    assert world.spooled_before_delivery == [True, True]
    kept = world.spool.load(second.ticket.ref.key)
    assert (kept.payload, kept.awaiting_verdict) == (b"two", True)
    assert (kept.key, kept.attempt, kept.entry_id) == second.fence
    assert world.outbox.holds(first)
    found = await world.bench.rollouts.read(2, 1000)
    assert [(item.payload, item.awaiting_verdict) for item in found] == [(b"one", False), (b"two", True)]


async def test_a_full_spool_stops_claims_and_not_deliveries(world: World) -> None:
    first, second, third = await world.claims(3)
    await world.outbox.hand_in(first, Finished(b"x" * 60_000))
    assert world.outbox.has_room()
    await world.outbox.hand_in(second, Finished(b"y" * 60_000))
    assert world.seen == {"not spooled": 1}
    assert not world.outbox.has_room()
    assert not world.outbox.holds(second)
    assert len(await world.bench.rollouts.read(2, 1000)) == 2
    world.spool.forget([first.ticket.ref.key])
    # The next append frees what was forgotten.
    await world.outbox.hand_in(third, Finished(b"z" * 60_000))
    assert world.outbox.holds(third)
    world.spool.forget([third.ticket.ref.key])
    world.spool.close()
    assert world.outbox.has_room()


async def test_waste_in_the_spool_does_not_stop_claims_for_good(world: World) -> None:
    claims = await world.claims(10)
    for claim in claims:
        await world.outbox.hand_in(claim, Finished(bytes([claim.attempt]) * 10_000))
    assert not world.outbox.has_room()
    # Every second one stays for long, and so do the files.
    spooled = world.spool.keys()
    world.spool.forget(spooled[::2])
    world.spool.forget(spooled[1:6])
    assert world.spool.used_bytes > MAX_BYTES - 10_000
    assert world.outbox.has_room()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_fails_stops_claims_and_not_deliveries(
    world: World, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (claim,) = await world.claims(1)
    world.disk.error = error
    await world.outbox.hand_in(claim, Finished(b"one"))
    assert world.seen == {"not spooled": 1}
    assert len(await world.bench.rollouts.read(1, 1000)) == 1
    free = [1000]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2_000_000_000, 0, free[0]))
    assert not world.outbox.has_room()
    free[0] = 500_000_000
    assert world.outbox.has_room()


async def test_a_broker_without_room_is_waited_for(world: World) -> None:
    (claim,) = await world.claims(1)
    world.failures = [BrokerFull("full"), Unavailable("the storage is away"), BrokerFull("full"), BrokerLost("away")]
    await world.outbox.hand_in(claim, Finished(b"one"))
    assert world.seen == {"held": 3}
    (item,) = await world.bench.rollouts.read(1, 1000)
    assert item.payload == b"one"


async def test_a_held_rollout_whose_lease_is_lost_is_given_up(world: World) -> None:
    (claim,) = await world.claims(1)
    world.failures = [BrokerFull("full")] * 9
    lost = iter([False, False, True])
    with pytest.raises(Fenced, match="while it was held"):
        await world.outbox.hand_in(claim, Finished(b"one"), lambda: next(lost))
    assert world.seen == {"held": 2}
    # The sweeper may still need it.
    assert world.outbox.holds(claim)


async def test_a_broker_that_stays_away_is_said(world: World) -> None:
    (claim,) = await world.claims(1)
    world.failures = [BrokerLost("away")] * 99
    with pytest.raises(Unavailable, match="away for"):
        await world.outbox.hand_in(claim, Finished(b"one"))
    assert world.outbox.holds(claim)


async def test_what_the_queue_refuses_is_not_kept(world: World) -> None:
    first, second = await world.claims(2)
    world.failures = [Rejected("oversized", "too large"), Fenced("taken")]
    with pytest.raises(Rejected):
        await world.outbox.hand_in(first, Finished(b"one"))
    assert not world.outbox.holds(first)
    # Another attempt has the ticket, as far as this broker knows: it may have forgotten ours.
    with pytest.raises(Fenced):
        await world.outbox.hand_in(second, Finished(b"two"))
    assert world.outbox.holds(second)


async def test_without_a_spool(world: World) -> None:
    (claim,) = await world.claims(1)
    plain = Outbox(world, None, 0.3, world)
    await plain.hand_in(claim, Finished(b"one"))
    assert plain.has_room()
    assert not plain.holds(claim)
    assert world.spooled_before_delivery == [False]
