"""When a reply is late, and that moving it biases nothing: an injected clock, made-up streams."""

from __future__ import annotations

import random
import statistics
from collections.abc import AsyncGenerator

import pytest
from scripted_peers import event

from longshore.actor import drawing
from longshore.actor.balancing import Balancer, Trouble
from longshore.actor.dispatch import Dispatch
from longshore.actor.drawing import Ask, Drawer, DrawLimits, TryFailed, Wanted
from longshore.actor.limit import Report
from longshore.actor.moving import SLOW, Flight, Mover
from longshore.actor.pace import Budget, Paces, Progress
from longshore.proto.v1 import generator_pb2, rollout_pb2
from longshore.types import Sampling


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def measured(first: float = 0.2, pace: float = 0.01, prompt: int = 100, samples: int = 40) -> Paces:
    paces = Paces()
    for _ in range(samples):
        paces.first(first, prompt)
        paces.window(2.0, round(2.0 / pace))
    return paces


def test_first_tokens_are_late_by_what_another_generator_shows(clock: Clock) -> None:
    progress = Progress(Paces(), 100, clock)
    clock.now += 1.9
    assert not progress.is_late(measured(0.2))
    clock.now += 0.2
    assert progress.is_late(measured(0.2))
    assert not progress.is_late(measured(0.8))
    # Too little is known of that one.
    assert not progress.is_late(measured(0.2, samples=31))
    # A prompt ten times as long as any that it had may take ten times as long.
    assert not progress.is_late(measured(0.2, prompt=10))


def test_a_pace_is_late_and_a_long_reply_is_not(clock: Clock) -> None:
    other = measured(pace=0.01)
    progress = Progress(Paces(), 100, clock)
    progress.drew(1)
    # An hour at a good pace.
    for _ in range(3600):
        clock.now += 1.0
        progress.drew(50)
        assert not progress.is_late(other)
    # A pause as long as a window, without a token.
    clock.now += 1.9
    assert not progress.is_late(other)
    clock.now += 1.2
    assert progress.is_late(other)


def test_a_trickle_is_late(clock: Clock) -> None:
    progress = Progress(Paces(), 100, clock)
    progress.drew(1)
    for _ in range(5):
        clock.now += 0.5
        progress.drew(5)
    # Ten tokens a second, when a third of a hundred would do.
    assert progress.is_late(measured(pace=0.01))
    assert not progress.is_late(measured(pace=0.05))


def test_a_slow_model_is_given_its_time(clock: Clock) -> None:
    other = measured(pace=1.0)
    progress = Progress(Paces(), 100, clock)
    progress.drew(1)
    clock.now += 19.0
    assert not progress.is_late(other)
    clock.now += 1.5
    assert progress.is_late(other)


def test_short_replies_are_measured_too(clock: Clock) -> None:
    paces = Paces()
    for _ in range(40):
        progress = Progress(paces, 100, clock)
        clock.now += 0.1
        progress.drew(4)
        clock.now += 0.2
        progress.drew(20)
        progress.ended()
    assert paces.late_pace() == pytest.approx(0.03)
    assert paces.late_first(100) == 2.0


def test_moves_cost_at_most_a_twentieth() -> None:
    budget = Budget()
    assert not budget.spend(1)
    for _ in range(100):
        budget.earned(100)
    assert budget.spend(400)
    assert not budget.spend(101)
    assert budget.spend(100)


class Site:
    """Two generators, one of which has shown how fast it is."""

    def __init__(self, clock: Clock) -> None:
        self.balancer = Balancer(clock, random.Random(1))
        self.mover = Mover(self.balancer, clock)
        for name in ("fast", "slow"):
            self.balancer.join(name)
            self.balancer.serves(name, True)
            self.balancer.reported(name, Report(0, 0, 8, 0.0))
        for _ in range(40):
            flight = self.mover.flight("fast", 100, 1)
            clock.now += 0.1
            flight.progress.drew(1)
            clock.now += 0.3
            flight.progress.drew(30)
            self.mover.landed(flight)

    def stalled(self, clock: Clock, count: int, number: int = 1) -> list[Flight]:
        flights = [self.mover.flight("slow", 100, number) for _ in range(count)]
        clock.now += 10.0
        return flights


def test_late_replies_are_moved_as_far_as_the_budget_and_the_room_go(clock: Clock) -> None:
    site = Site(clock)
    flights = site.stalled(clock, 20)
    site.mover.look()
    assert not any(flight.moved for flight in flights)
    site.mover.earned(20 * 400)
    site.mover.look()
    assert sum(flight.moved == SLOW for flight in flights) == 4
    # Enough for all, and room for nine: the other decodes eight, and one is ready.
    site.mover.earned(10**6)
    site.mover.look()
    assert sum(flight.moved == SLOW for flight in flights) == 4 + 9
    # A reply is not sent to and fro.
    (tired,) = site.stalled(clock, 1, number=3)
    site.mover.look()
    assert not tired.moved


def test_nothing_is_moved_without_another_generator_that_has_room(clock: Clock) -> None:
    site = Site(clock)
    site.mover.earned(10**6)
    for _ in range(9):
        site.balancer.sent("fast", ())
    (flight,) = site.stalled(clock, 1)
    site.mover.look()
    assert not flight.moved
    site.balancer.serves("fast", False)
    site.mover.look()
    assert not flight.moved


class Geometric:
    """Streams of a policy whose replies have geometric lengths, of mean 10. The stream breaks, or is moved, before any
    token with a chance of 1 in 20."""

    def __init__(self) -> None:
        self.chance = random.Random(7)
        self.breaks = 0
        self.open: Flight | None = None

    async def stream(
        self, generator: str, wanted: Wanted, ask: Ask, timeout_s: float
    ) -> AsyncGenerator[generator_pb2.ReplyEvent]:
        while True:
            if self.chance.random() < 0.05:
                self.breaks += 1
                raise TryFailed(Trouble.LATE, "moved")
            stops = self.chance.random() < 0.1
            yield event([1 if stops else 2], 1, finish=rollout_pb2.FINISH_REASON_STOP if stops else 0)
            if stops:
                return

    def retried_generator(self) -> None: ...
    def moved(self, reason: str, tokens: int) -> None: ...


async def test_streams_that_break_do_not_make_replies_shorter(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing anew what broke would give a mean length of 6.9: a long reply meets more breaks."""
    monkeypatch.setattr(drawing, "_FIRST_PAUSE_S", 0.0)
    site, source = Site(clock), Geometric()
    dispatch = Dispatch(site.balancer, clock)
    drawer = Drawer(source, dispatch, site.mover, DrawLimits(60.0, 60.0), source, clock)
    replies = [
        await drawer.draw(Wanted(str(number), [5, 6], Sampling(1.0, 1000, (1,)), (str(number),)))
        for number in range(3000)
    ]
    lengths = [len(reply.token_ids) for reply in replies]
    assert source.breaks > 1000
    error = statistics.stdev(lengths) / len(lengths) ** 0.5
    assert abs(statistics.mean(lengths) - 10) < 4 * error
