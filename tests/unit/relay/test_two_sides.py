"""The relay's halves on real queues, under every kind of bad luck; see tests/support/relay_world.py."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relay_world import SITE, World

from longshore.errors import Fenced, Unavailable
from longshore.relay import home_side, site_side
from longshore.rollout_queue import broker
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.spool import SpoolFull
from longshore.rollout_queue.tickets import DRAIN
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_side, "READ_MS", 0)
    monkeypatch.setattr(site_side, "INCARNATION_CHECK_S", 0.0)
    for name in ("SETTLE_S", "FORGET_S", "TELL_S", "LEASE_PAUSE_S", "INCARNATION_CHECK_S"):
        monkeypatch.setattr(home_side, name, 0.0)


def ticket_maker(job: JobRef) -> Callable[[int], Ticket]:
    def make(number: int) -> Ticket:
        task = Task(f"task-{number}", (Message("user", "?"),), "x")
        ref = TicketRef(job, number, 0)
        return Ticket(ref, 1, Purpose.TRAIN, task, Sampling(1.0, 4), learner_epoch=1, issued_at=1.0)

    return make


async def opened(redis: Any, folder: Path) -> World:
    job = JobRef("default", f"job-{uuid.uuid4().hex[:12]}")
    world = World(redis, job, folder / uuid.uuid4().hex, ticket_maker(job))
    await world.open()
    return world


@pytest.fixture
async def world(redis: Any, tmp_path: Path) -> AsyncIterator[World]:
    made = await opened(redis, tmp_path)
    yield made
    made.spool.close()


async def site_states(world: World) -> dict[str, int]:
    counts = await Ledger(world.redis, world.job, SITE).counts()
    assert counts.balanced
    return {state: number for state, number in counts.states.items() if number}


async def home_states(world: World) -> dict[str, int]:
    counts = await Ledger(world.redis, world.job).counts()
    assert counts.balanced, counts
    return {state: number for state, number in counts.states.items() if number}


async def work(world: World) -> None:
    """The relay takes its allowance, and the site starts on it."""
    await world.site_step()
    await world.home_step()
    await world.site_step()
    await world.site_step()
    await world.site_claims_some(100)


async def test_tickets_go_out_up_to_the_allowance_and_rollouts_come_home(world: World) -> None:
    await world.issue(10)
    await work(world)
    assert len(world.site_claims) == 8
    assert await home_states(world) == {"queued": 2, "running": 8}
    await world.site_delivers(3)
    await world.site_step()
    assert await site_states(world) == {"running": 5, "forwarded": 3}
    assert len(world.spool.keys()) == 3
    # Home hears of what is spooled before it is handed in.
    await world.home_step()
    assert await home_states(world) == {"queued": 2, "running": 5, "spooled": 3}
    await world.hand_in()
    assert await home_states(world) == {"queued": 2, "running": 5, "delivered": 3}
    await world.home_step()
    await world.home_step()
    # Delivered is not yet covered; the places are free again.
    assert len(world.spool.keys()) == 3
    assert await home_states(world) == {"running": 7, "delivered": 3}
    await world.learner_reads()
    await world.learner_checkpoints()
    await world.home_step()
    assert world.spool.keys() == []
    await world.finish()
    assert world.repeats == 0
    assert all(payload.split()[2] == b"west" for payload in world.payloads.values())


async def test_home_away_the_site_goes_on_and_spools(world: World) -> None:
    await world.issue(8)
    await work(world)
    world.to_home.down = True
    await world.home_step()
    await world.site_delivers(8)
    await world.site_step()
    await world.hand_in()
    assert len(world.spool.keys()) == 8
    assert await site_states(world) == {"forwarded": 8}
    world.kill_relay()
    for _ in range(3):
        await world.home_step()
        await world.site_step()
    assert len(world.spool.keys()) == 8
    world.to_home.down = False
    await world.home_step()
    await world.hand_in()
    assert await home_states(world) == {"delivered": 8}
    await world.finish()
    assert world.repeats == 0


async def test_a_ticket_that_ended_at_the_site_ends_at_home_with_its_reason(world: World) -> None:
    await world.issue(2)
    await work(world)
    await world.site_rejects()
    await world.site_step()
    await world.hand_in()
    assert await home_states(world) == {"running": 1, "prompt": 1}
    # The site counts a ticket by how it ended there.
    assert await site_states(world) == {"running": 1, "prompt": 1}
    await world.learner_reads()
    await world.learner_checkpoints()
    assert set(world.ended.values()) == {"prompt"}
    await world.finish()
    assert world.repeats == 0


async def test_a_site_whose_leases_ran_out_is_fenced(world: World) -> None:
    await world.issue(2)
    await work(world)
    # One is finished while the link is down, the other one is still in work.
    world.to_home.down = True
    await world.site_delivers(1)
    await world.site_step()
    await world.expire()
    await world.home_claims_one()
    await world.home_claims_one()
    assert len(world.home_claims) == 2
    world.to_home.down = False
    for _ in range(3):
        await world.home_step()
        await world.hand_in()
        await world.site_step()
    assert world.book.held == {}
    assert await site_states(world) == {"forwarded": 1, "lease_lost": 1}
    await world.home_delivers()
    await world.home_delivers()
    await world.finish()
    assert world.repeats == 0
    assert all(payload.split()[2] == b"home" for payload in world.payloads.values())


async def test_leases_that_ran_out_and_that_nobody_took_are_taken_again(world: World) -> None:
    await world.issue(3)
    await work(world)
    world.to_home.down = True
    await world.site_delivers(1)
    await world.site_step()
    await world.expire()
    assert await home_states(world) == {"queued": 3}
    world.to_home.down = False
    await world.home_step()
    await world.hand_in()
    assert await home_states(world) == {"running": 2, "delivered": 1}
    # The work in progress went on: nothing was started twice.
    assert await site_states(world) == {"running": 2, "forwarded": 1}
    await world.finish()
    assert world.repeats == 0


async def test_work_goes_on_under_its_own_tickets_though_others_wait(world: World) -> None:
    await world.issue(30)
    await work(world)
    ours = set(world.book.held)
    await world.expire()
    await world.home_step()
    assert set(world.book.held) == ours
    await world.site_step()
    assert await site_states(world) == {"running": 8}
    await world.finish()
    assert world.repeats == 0


async def test_a_finished_rollout_is_offered_again_when_its_ticket_comes_free(world: World) -> None:
    await world.issue(30)
    await work(world)
    first = world.site_claims[0].ticket.ref.key
    world.to_home.down = True
    await world.site_delivers(1)
    await world.site_step()
    await world.expire()
    # 22 that nobody had come first, then the eight: all of them are somebody's at the home site.
    claims = await world.home_tickets.claim("actor-h", 30, 0)
    world.to_home.down = False
    for _ in range(2):
        await world.home_step()
        await world.site_step()
    assert world.book.parked == [first]
    for claim in claims:
        if claim.ticket.ref.key == first:
            await world.home_tickets.give_back(claim, DRAIN)
    # No place is free, but this one is finished.
    world.home_side._allowance = 0
    await world.home_step()
    await world.hand_in()
    assert (await home_states(world))["delivered"] == 1
    world.home_side._allowance = 8
    world.home_claims = claims
    await world.finish()
    assert world.repeats == 0


async def test_a_job_that_ends_at_home_ends_at_the_site(world: World) -> None:
    await world.issue(3)
    await work(world)
    await world.home_tickets.close(world.epoch, "cancelled")
    for _ in range(2):
        await world.home_step()
        await world.site_step()
    assert await site_states(world) == {"lease_lost": 3}
    assert world.book.held == {}
    assert world.book.judged == set()


async def test_a_home_that_lost_its_tail_gets_everything_again(world: World) -> None:
    await world.issue(4)
    await work(world)
    await world.home.save()
    await world.site_delivers(2)
    await world.site_step()
    await world.hand_in()
    await world.home_step()
    await world.home_loses_tail()
    await world.home_step()
    await world.hand_in()
    assert await home_states(world) == {"running": 2, "delivered": 2}
    await world.finish()


async def test_a_home_that_lost_every_lease_gives_them_back(world: World) -> None:
    await world.home.save()
    await world.issue(4)
    await work(world)
    await world.site_delivers(2)
    await world.site_step()
    await world.home_loses_tail()
    for _ in range(3):
        await world.home_step()
        await world.site_step()
    # Home does not know the tickets yet; nothing is ended because of that.
    assert await site_states(world) == {"running": 2, "forwarded": 2}
    assert len(world.spool.keys()) == 2
    await world.learner_reconciles()
    await world.home_step()
    await world.hand_in()
    assert await home_states(world) == {"running": 2, "delivered": 2}
    await world.finish()
    assert world.repeats == 0


async def test_a_site_that_lost_its_tail_is_told_again(world: World) -> None:
    await world.west.save()
    await world.issue(4)
    await work(world)
    await world.site_delivers(2)
    await world.site_step()
    await world.site_loses_tail()
    world.site_claims.clear()
    assert await site_states(world) == {}
    assert await world.site_rollouts.covered(["0.0"]) is None
    await world.site_step()
    await world.site_step()
    await world.site_step()
    # Two are in the spool; the other two are to be done again.
    assert await site_states(world) == {"queued": 2}
    assert await world.site_rollouts.covered(["0.0", "3.0"]) == {"0.0"}
    await world.finish()
    assert world.repeats == 0


async def test_a_site_that_lost_its_tail_trusts_nothing_before_home_has_spoken(world: World) -> None:
    await world.west.save()
    await world.issue(2)
    await work(world)
    world.to_home.down = True
    before = await world.site_tickets.raise_epoch(0)
    world.kill_relay()
    await world.site_loses_tail()
    for _ in range(3):
        await world.home_step()
        await world.site_step()
    # An actor there may have these spooled: they are not covered only because nobody remembers them.
    assert await world.site_rollouts.covered(["0.0"]) is None
    # It has forgotten its last epoch too; the new one is above it all the same.
    assert await world.site_tickets.raise_epoch(0) > before
    world.to_home.down = False
    await world.home_step()
    await world.site_step()
    assert await site_states(world) == {"queued": 2}
    assert await world.site_rollouts.covered(["0.0"]) == set()
    await world.finish()
    assert world.repeats == 0


async def test_an_epoch_that_the_site_forgot_is_in_force_again(world: World) -> None:
    await world.west.save()
    await world.site_step()
    epoch = await world.site_tickets.raise_epoch(0)
    await world.site_loses_tail()
    assert await world.site_tickets.raise_epoch(0) < epoch
    await world.site_step()
    assert await world.site_tickets.raise_epoch(0) == epoch


async def test_a_ticket_that_ended_at_the_site_is_not_given_to_it_again(world: World) -> None:
    await world.issue(2)
    await work(world)
    await world.site_rejects()
    # A new life of the relay hears from home that it holds both, before it has read why one is gone.
    world.kill_relay()
    await world.home_step()
    for _ in range(4):
        await world.site_step()
        assert "queued" not in await site_states(world)
    assert len(world.spool.keys()) == 1
    await world.finish()
    assert sorted(world.ended.values()) == ["prompt", "trained"]


async def test_a_full_spool_holds_rollouts_back_and_loses_none(world: World) -> None:
    world.spool_bytes = 400
    world.kill_relay()
    await world.issue(12)
    await work(world)
    world.to_home.down = True
    for _ in range(4):
        await world.site_delivers(2)
        with contextlib.suppress(SpoolFull):
            await world.site_side.step()
    assert world.book.spool_full
    kept = len(world.spool.keys())
    assert 1 < kept < 8
    assert (await site_states(world))["delivered"] == 8 - kept
    # Nothing new is taken on meanwhile.
    world.to_home.down = False
    with contextlib.suppress(Unavailable):
        await world.home_side.step()
    assert (await home_states(world))["queued"] == 4
    # A restart of the site's broker, with those that were refused in our hands.
    world.west.restarts += 1
    for _ in range(12):
        await world.hand_in()
        await world.home_step()
        await world.learner_reads()
        await world.learner_checkpoints()
        with contextlib.suppress(SpoolFull):
            await world.site_side.step()
    assert len(world.ended) >= 8
    assert not world.book.spool_full
    await world.finish()
    assert world.repeats == 0


async def test_a_rollout_damaged_at_the_site_ends_its_ticket_with_a_reason(world: World) -> None:
    await world.issue(2)
    await work(world)
    await world.site_delivers(2)
    stream = world.west.keys.rollouts
    (entry, fields), _ = await world.redis.xrange(stream)
    await world.redis.delete(stream)
    await broker.setup(world.redis, world.west.keys)
    head, _, _ = fields[b"rollout"].rpartition(b" ")
    await world.redis.xadd(stream, {**fields, b"rollout": head + b" " + b"0" * 64}, id=entry)
    await world.site_step()
    await world.site_step()
    await world.hand_in()
    assert (await home_states(world))["corrupt"] == 1
    letters = await world.redis.xrange(world.west.keys.dead)
    assert [letter[b"reason"] for _, letter in letters] == [b"corrupt"]


async def test_a_damaged_record_is_attempted_again(world: World) -> None:
    await world.issue(1)
    await work(world)
    await world.site_delivers(1)
    await world.site_step()
    (path,) = world.folder.glob("*.spool")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    await world.hand_in()
    assert world.spool.keys() == []
    await world.site_step()
    assert await site_states(world) == {"queued": 1, "forwarded": 1}
    await world.finish()
    assert world.repeats == 0


async def test_what_was_read_before_a_death_is_read_again(world: World) -> None:
    await world.issue(4)
    await work(world)
    await world.site_delivers(3)
    # Another relay's life: the entries are delivered to it, and it dies before anything is on the disk.
    assert len(await world.site_rollouts.read(10, 0)) == 3
    world.kill_relay()
    for _ in range(2):
        await world.site_step()
    assert len(world.spool.keys()) == 3
    await world.finish()
    assert world.repeats == 0


async def test_an_acknowledgement_that_never_happened_is_made_good(world: World) -> None:
    await world.issue(4)
    await work(world)
    await world.west.save()
    await world.site_delivers(2)
    await world.site_step()
    # Spooled and acknowledged; the site's broker forgets both the delivery and the acknowledgement.
    await world.site_loses_tail()
    assert await site_states(world) == {"running": 4}
    await world.site_step()
    assert await site_states(world) == {"running": 2, "forwarded": 2}
    await world.finish()
    assert world.repeats == 0


async def test_a_superseded_relay_can_do_nothing_at_the_site(world: World) -> None:
    await world.issue(1)
    await work(world)
    await world.site_delivers(1)
    await world.site_tickets.open_epoch()
    with pytest.raises(Fenced):
        await world.site_side.step()


ACTS = st.lists(
    st.sampled_from(
        [
            *("site_step",) * 5,
            *("home_step",) * 4,
            *("hand_in",) * 3,
            *("site_claims_some", "site_delivers") * 3,
            *("learner_reads", "learner_checkpoints") * 2,
            *("issue", "site_rejects", "site_actors_die", "home_claims_one", "home_delivers", "kill_relay", "expire"),
            *("cut_home", "heal_home", "cut_site", "heal_site", "lose_home_reply", "lose_site_reply"),
            *("save_home", "home_loses_tail", "learner_reconciles", "save_site", "site_loses_tail"),
        ]
    ),
    min_size=10,
    max_size=80,
)


async def act(world: World, name: str) -> None:
    if name == "issue":
        await world.issue(3)
    elif name == "kill_relay":
        world.kill_relay()
    elif name in ("cut_home", "heal_home"):
        world.to_home.down = name == "cut_home"
    elif name in ("cut_site", "heal_site"):
        world.to_site.down = name == "cut_site"
    elif name == "lose_home_reply":
        world.to_home.lost_replies = 1
    elif name == "lose_site_reply":
        world.to_site.lost_replies = 1
    elif name == "save_home":
        await world.home.save()
    elif name == "save_site":
        await world.west.save()
    else:
        await getattr(world, name)()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(acts=ACTS)
async def test_whatever_happens_each_ticket_ends_once(broker_url: str, tmp_path: Path, acts: list[str]) -> None:
    redis = broker.connect(broker_url)
    try:
        world = await opened(redis, tmp_path)
        await world.issue(6)
        for name in acts:
            await act(world, name)
        await asyncio.wait_for(world.finish(), 30)
        assert set(world.ended) == set(world.out)
        assert set(world.ended.values()) <= {"trained", "prompt"}
        if "home_loses_tail" not in acts:
            # Only a broker that forgot can be told of a ticket's end a second time.
            assert world.repeats == 0
        assert (await Ledger(redis, world.job).counts()).balanced
        world.spool.close()
    finally:
        await redis.aclose()
