"""The actor's loops on a real broker, with scripted work in place of generator and verifier."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from longshore.actor.episode import AttemptFailed
from longshore.actor.outbox import Finished, Outbox
from longshore.actor.runner import Runner, RunnerLimits, until_stopped
from longshore.errors import Fenced, Rejected, Unavailable
from longshore.rollout_queue.broker import BrokerFull
from longshore.rollout_queue.tickets import Claim

WAIT_S = 30.0


class Observations:
    """Counts how attempts ended."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.most = 0
        self.times_held = 0

    def started(self, running: int) -> None:
        self.most = max(self.most, running)

    def ended(self, outcome: str, seconds: float, running: int) -> None:
        assert seconds >= 0
        self.outcomes[outcome] += 1

    def not_spooled(self) -> None: ...

    def held(self) -> None:
        self.times_held += 1


class Work:
    """Makes `payload <key>`; `scripts` replace that for a ticket's first attempts. `gate` holds all of them up."""

    def __init__(self) -> None:
        self.scripts: dict[str, list[Exception]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.claims: list[Claim] = []
        self.cancelled: list[str] = []

    async def __call__(self, claim: Claim) -> Finished:
        self.claims.append(claim)
        key = claim.ticket.ref.key
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        if self.scripts.get(key):
            raise self.scripts[key].pop(0)
        return Finished(f"payload {key}".encode())


class Actor:
    """A runner in the background."""

    def __init__(self, bench: Any, name: str = "actor-0", **limits: float) -> None:
        self.work, self.seen, self.stop = Work(), Observations(), asyncio.Event()
        wanted = {"places": 8, "lease_s": 30.0, "drain_s": 0.2, "broker_patience_s": 20.0, **limits}
        self.outbox = Outbox(bench.rollouts, None, wanted["broker_patience_s"], self.seen)
        limits_ = RunnerLimits(**wanted)  # type: ignore[arg-type]
        self.runner = Runner(name, bench.tickets, self.outbox, self.work, limits_, self.seen)
        self.task = asyncio.create_task(self.runner.run(self.stop))

    async def end(self) -> None:
        self.stop.set()
        async with asyncio.timeout(WAIT_S):
            await self.task


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Actor]]:
    """Starts actors that are ended after the test."""
    actors: list[Actor] = []

    def make(bench: Any, **options: Any) -> Actor:
        actors.append(Actor(bench, **options))
        return actors[-1]

    yield make
    for actor in actors:
        actor.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            await actor.task


async def until(condition: Callable[[], Awaitable[bool] | bool], actor: Actor | None = None) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            assert actor is None or not actor.task.done(), actor.task
            await asyncio.sleep(0.01)


async def states(bench: Any) -> dict[str, int]:
    """Non-zero counts; one reading, so that it may be taken while actors work."""
    counts = await bench.ledger.counts()
    assert counts.balanced
    return {state: number for state, number in counts.states.items() if number}


async def delivered(bench: Any) -> int:
    return (await states(bench)).get("delivered", 0)


async def test_every_ticket_is_delivered_once_within_the_places(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(100)
    actor = start(bench, places=8)
    async with asyncio.timeout(WAIT_S):
        found = []
        while len(found) < 100:
            found += await bench.rollouts.read(100, 1000)
    assert {item.payload for item in found} == {f"payload {item.ticket_key}".encode() for item in found}
    assert len({item.ticket_key for item in found}) == 100
    await actor.end()
    assert actor.seen.outcomes == {"delivered": 100}
    assert actor.seen.most <= 8
    assert await states(bench) == {"delivered": 100}


async def test_places_are_never_exceeded_and_filled_again(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(10)
    actor = start(bench, places=3)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 3, actor)
    await asyncio.sleep(0.1)
    assert await states(bench) == {"queued": 7, "running": 3}
    actor.work.gate.set()
    await until(lambda: _equals(delivered(bench), 10), actor)


async def _equals(value: Awaitable[int], wanted: int) -> bool:
    return await value == wanted


async def test_how_attempts_end(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(6)
    actor = start(bench)
    actor.work.gate.clear()
    # As long as the gate is closed nothing has ended, so the scripts are in place for every first attempt.
    actor.work.scripts = {
        "0.0": [Rejected("prompt", "too long")],
        "0.1": [AttemptFailed("environment", "boom")],
        "0.2": [Unavailable("generator away")],
        "0.3": [KeyError("a bug")],
        "1.0": [Rejected("verifier_timeout", "slow")],
    }
    actor.work.gate.set()
    await until(lambda: _equals(delivered(bench), 4), actor)
    assert await states(bench) == {"delivered": 4, "prompt": 1, "verifier_timeout": 1}
    attempts = Counter(claim.ticket.ref.key for claim in actor.work.claims)
    assert attempts == {"0.0": 1, "0.1": 2, "0.2": 2, "0.3": 2, "1.0": 1, "1.1": 1}
    await actor.end()
    assert actor.seen.outcomes == {"delivered": 4, "rejected": 2, "given_back": 3}


async def test_a_ticket_that_always_fails_ends(redis: Any, make_bench: Any, start: Callable[..., Actor]) -> None:
    bench = make_bench(redis, max_attempts=3)
    await bench.issued(1)
    actor = start(bench)
    actor.work.scripts = {"0.0": [AttemptFailed("environment", "boom")] * 9}
    await until(lambda: _has(bench, "attempts_exhausted"), actor)
    assert len(actor.work.claims) == 3


async def _has(bench: Any, state: str) -> bool:
    return state in await states(bench)


async def test_a_lost_lease_cancels_its_attempt_alone(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(2)
    actor = start(bench, lease_s=0.9)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 2, actor)
    lost = actor.work.claims[0]
    taken: list[Claim] = []
    while not taken:
        # Another actor's view of a lease that nobody renewed.
        await bench.age([lost])
        taken = await bench.tickets.take_over("actor-9", 1, 1_800_000)
    await until(lambda: actor.work.cancelled == [lost.ticket.ref.key], actor)
    actor.work.gate.set()
    await until(lambda: _equals(delivered(bench), 1), actor)
    assert await states(bench) == {"delivered": 1, "running": 1}
    assert actor.seen.outcomes == {"cancelled": 1, "delivered": 1}
    # The other one's delivery counts.
    assert await bench.rollouts.deliver(taken[0], b"theirs")


async def test_a_delivery_in_progress_is_no_lost_lease(bench: Any, start: Callable[..., Actor]) -> None:
    """The broker closes the lease with the delivery: a renewal at that moment must not cancel the attempt."""
    await bench.issued(1)
    deliver, renewed = bench.rollouts.deliver, asyncio.Event()

    async def delivered_but_not_answered(claim: Claim, rollout: bytes, awaiting_verdict: bool) -> bool:
        found = await deliver(claim, rollout, awaiting_verdict)
        await renewed.wait()
        return bool(found)

    bench.rollouts.deliver = delivered_but_not_answered
    actor = start(bench, lease_s=60.0)
    await until(lambda: _equals(delivered(bench), 1), actor)
    await actor.runner._renew()
    renewed.set()
    await until(lambda: bool(actor.seen.outcomes), actor)
    assert actor.seen.outcomes == {"delivered": 1}


async def test_a_rollout_of_a_lost_lease_is_dropped(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(1)
    actor = start(bench)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 1, actor)
    await bench.age(actor.work.claims)
    (taken,) = await bench.tickets.take_over("actor-9", 1)
    actor.work.gate.set()
    await until(lambda: actor.seen.outcomes == {"fenced": 1}, actor)
    assert await bench.rollouts.deliver(taken, b"theirs")
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(actor.work.claims[0], b"ours")


async def test_takes_over_from_an_actor_that_died(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(4)
    dead = await bench.tickets.claim("actor-dead", 4, 0)
    assert len(dead) == 4
    actor = start(bench, lease_s=1.0)
    await until(lambda: _equals(delivered(bench), 4), actor)
    assert {claim.attempt for claim in actor.work.claims} == {2}


async def test_leases_are_renewed_while_work_goes_on(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(3)
    actor = start(bench, lease_s=1.0)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 3, actor)
    # Longer than the lease, and any actor may take over what has run out.
    other = start(bench, name="actor-1", lease_s=1.0)
    await asyncio.sleep(2.0)
    assert other.work.claims == []
    actor.work.gate.set()
    await until(lambda: _equals(delivered(bench), 3), actor)


async def test_drain_finishes_what_it_can_and_gives_the_rest_back(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(3)
    actor = start(bench, drain_s=0.3)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 3, actor)
    await actor.end()
    assert await states(bench) == {"queued": 3}
    assert sorted(actor.work.cancelled) == ["0.0", "0.1", "0.2"]
    # A drained attempt does not count against the ticket.
    again = await bench.tickets.claim("actor-1", 3, 1000)
    assert len(again) == 3
    finishing = start(bench, name="actor-2", drain_s=WAIT_S)
    await bench.tickets.give_back(again[0], "drain")
    finishing.work.gate.clear()
    await until(lambda: len(finishing.work.claims) == 1, finishing)
    finishing.stop.set()
    finishing.work.gate.set()
    await finishing.end()
    assert finishing.seen.outcomes == {"delivered": 1}


async def test_nothing_is_claimed_while_there_is_no_room(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(2)
    room = [False]
    actor = start(bench)
    actor.outbox.has_room = lambda: room[0]  # type: ignore[method-assign]
    await asyncio.sleep(0.3)
    assert await states(bench) == {"queued": 2}
    room[0] = True
    await until(lambda: _equals(delivered(bench), 2), actor)


async def test_an_attempt_that_finds_itself_superseded_ends(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(1)
    actor = start(bench)
    actor.work.scripts = {"0.0": [Fenced("another attempt holds it")]}
    await until(lambda: actor.seen.outcomes == {"fenced": 1}, actor)
    assert await states(bench) == {"running": 1}


async def test_a_rollout_is_held_while_its_lease_lives(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(2)
    deliver, full = bench.rollouts.deliver, [True]

    async def refused(claim: Claim, rollout: bytes, awaiting_verdict: bool) -> bool:
        if full[0]:
            raise BrokerFull("full")
        return bool(await deliver(claim, rollout, awaiting_verdict))

    bench.rollouts.deliver = refused
    actor = start(bench, places=2, lease_s=0.6)
    # Longer than the lease.
    await asyncio.sleep(1.2)
    assert actor.seen.times_held >= 2
    assert await states(bench) == {"running": 2}
    lost = actor.work.claims[0]
    taken: list[Claim] = []
    while not taken:
        await bench.age([lost])
        taken = await bench.tickets.take_over("actor-9", 1, 1_800_000)
    await until(lambda: actor.seen.outcomes == {"fenced": 1}, actor)
    full[0] = False
    # The one that was taken from it may have come back since, so that both are delivered.
    await until(lambda: actor.seen.outcomes["delivered"] >= 1, actor)
    assert actor.seen.outcomes["fenced"] == 1
    assert await delivered(bench) >= 1


async def test_what_is_spooled_is_not_given_back(bench: Any, start: Callable[..., Actor]) -> None:
    await bench.issued(2)
    actor = start(bench, drain_s=0.2)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 2, actor)
    actor.outbox.holds = lambda claim: claim.ticket.ref.key == "0.0"  # type: ignore[method-assign]
    await actor.end()
    assert await states(bench) == {"running": 1, "queued": 1}


async def test_survives_the_broker_s_death(
    private_broker: Any, connect: Callable[..., Any], make_bench: Any, start: Callable[..., Actor]
) -> None:
    bench = make_bench(connect(private_broker.url, patience_s=0.2))
    await bench.issued(12)
    # The append-only file is flushed once a second.
    await asyncio.sleep(1.2)
    actor = start(bench, places=4, lease_s=2.0)
    actor.work.gate.clear()
    await until(lambda: len(actor.work.claims) == 4, actor)
    private_broker.kill()
    actor.work.gate.set()
    await asyncio.sleep(1.0)
    assert not actor.task.done()
    private_broker.start()
    await until(lambda: _equals(delivered(bench), 12), actor)


async def test_a_broker_that_stays_away_ends_the_actor(
    private_broker: Any, connect: Callable[..., Any], make_bench: Any, start: Callable[..., Actor]
) -> None:
    bench = make_bench(connect(private_broker.url, patience_s=0.1))
    await bench.tickets.setup()
    actor = start(bench, broker_patience_s=0.5)
    await asyncio.sleep(0.1)
    private_broker.kill()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(BaseExceptionGroup) as raised:
            await actor.task
    assert raised.group_contains(Unavailable, match="away for .* the broker does not answer")


async def test_being_told_to_stop_ends_the_wait_for_the_broker(
    private_broker: Any, connect: Callable[..., Any], make_bench: Any, start: Callable[..., Actor]
) -> None:
    bench = make_bench(connect(private_broker.url, patience_s=0.1))
    await bench.tickets.setup()
    actor = start(bench, broker_patience_s=600.0)
    await asyncio.sleep(0.1)
    private_broker.kill()
    await asyncio.sleep(0.3)
    await actor.end()


async def test_a_cancellation_is_never_lost(redis: Any, make_bench: Any) -> None:
    """Under redis-py on Python 3.11 one in three was, and the actor went on for ever."""
    for number in range(25):
        bench = make_bench(redis)
        await bench.issued(30)
        actor = Actor(bench, places=4)
        await asyncio.sleep(0.003 * number)
        actor.task.cancel()
        await asyncio.wait([actor.task], timeout=WAIT_S)
        assert actor.task.cancelled()


async def test_until_stopped() -> None:
    stop, calls = asyncio.Event(), []

    async def call() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise Unavailable("not yet")
        return "ready"

    assert await until_stopped(call, stop, "it", 0.001) == "ready"
    stop.set()
    assert await until_stopped(call, stop, "it", 0.001) is None
