"""Which generator is chosen, how many requests it may have, and when it is set aside: an injected clock, no waiting."""

from __future__ import annotations

import itertools
import random

import pytest

from longshore.actor import balancing
from longshore.actor.balancing import Balancer, Trouble
from longshore.actor.limit import Limit, Report

IDLE = Report(0, 0, 16, 0.0)


class World:
    def __init__(self, number: int, report: Report = IDLE) -> None:
        self.now = 100.0
        self.balancer = Balancer(lambda: self.now, random.Random(1))
        for name in "abcdefgh"[:number]:
            self.balancer.join(name)
            self.balancer.serves(name, True)
            self.balancer.reported(name, report)

    def send(self, *prefixes: str, avoid: tuple[str, ...] = ()) -> str:
        name = self.balancer.choose(prefixes, avoid)
        assert name is not None
        self.balancer.sent(name, prefixes)
        return name

    def fail(self, name: str, trouble: Trouble) -> None:
        self.balancer.sent(name, ())
        self.balancer.ended(name, trouble)


def test_nothing_goes_to_one_that_does_not_serve_or_has_not_reported() -> None:
    world = World(0)
    world.balancer.join("a")
    assert world.balancer.choose(()) is None
    world.balancer.serves("a", True)
    assert (world.balancer.choose(()), world.balancer.usable()) == (None, [])
    world.balancer.reported("a", IDLE)
    assert world.balancer.choose(()) == "a"
    world.balancer.serves("a", False)
    assert world.balancer.choose(()) is None
    # What it said before it went is of no use when it comes back.
    world.balancer.serves("a", True)
    assert world.balancer.choose(()) is None
    world.balancer.leave("a")
    world.balancer.reported("a", IDLE)
    assert world.balancer.choose(()) is None


def test_the_least_loaded_is_chosen_by_our_requests_and_by_others() -> None:
    world = World(3)
    assert sorted(world.send(str(number)) for number in range(3)) == ["a", "b", "c"]
    # Of a's five requests one is ours: it has four of others.
    world.balancer.reported("a", Report(5, 0, 16, 0.1))
    world.balancer.reported("b", Report(1, 0, 16, 0.1))
    # As wide as two of the others.
    world.balancer.reported("c", Report(1, 0, 32, 0.1))
    chosen = [world.send(str(number)) for number in range(3, 12)]
    assert [chosen.count(name) for name in "abc"] == [0, 3, 6]


def test_a_prefix_stays_with_its_holder_unless_that_is_overloaded() -> None:
    world = World(2)
    holder = world.send("7.0", "7")
    other = "b" if holder == "a" else "a"
    # Up to a quarter of 16 more than the other has.
    assert {world.send(f"7.{number}", "7") for number in range(1, 5)} == {holder}
    assert world.send("7.5", "7") == other
    # The group's newest place counts; a rollout's own one counts more.
    assert world.balancer.choose(("7.6", "7")) == other
    assert world.balancer.choose(("7.0", "7")) == holder
    # One that leaves is no holder.
    world.balancer.serves(holder, False)
    assert world.send("7.0", "7") == other


def test_whoever_has_the_version_comes_first() -> None:
    world = World(3)
    for name, versions in (("a", (7,)), ("b", (8, 5)), ("c", (7, 5))):
        world.balancer.reported(name, Report(0, 0, 16, 0.0, versions))
    world.balancer.sent("a", ["p"])
    assert world.balancer.choose(["p"]) == "a"
    assert world.balancer.choose(["p"], accepts=lambda version: version == 8) == "b"
    assert {world.balancer.choose(["p"], accepts=lambda version: version == 5) for _ in range(20)} == {"b", "c"}
    assert world.balancer.choose(["p"], accepts=lambda version: version >= 7) == "a"
    # Nobody has it: somebody will have to bring it.
    assert world.balancer.choose(["p"], accepts=lambda version: version == 3) == "a"


def test_remembered_holders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "_MAX_HOLDERS", 3)
    world = World(2)
    first = world.send("0")
    for number in range(1, 4):
        world.send(str(number))
    assert len(world.balancer._holders) == 3
    world.balancer.ended(first)
    assert "0" not in world.balancer._holders


def test_one_that_is_away_is_set_aside_for_longer_and_longer_and_tried_by_one_request() -> None:
    world = World(2)
    pauses = []
    for _ in range(9):
        # Many that fail at once are one failure.
        for _ in range(5):
            world.balancer.sent("a", ())
        for _ in range(5):
            world.balancer.ended("a", Trouble.AWAY)
        assert world.balancer.usable() == ["b"]
        pause = world.balancer.next_pause_end()
        assert pause is not None
        pauses.append(pause)
        world.now += pause
        # Its turn has come: one request goes there, a second does not.
        assert world.send(avoid=("b",)) == "a"
        assert world.balancer.choose((), avoid=("b",)) is None
        world.balancer.ended("a")
    assert 0.25 <= pauses[0] <= 0.5
    assert 15 <= pauses[-1] <= 30
    assert all(later <= 4 * sooner for sooner, later in itertools.pairwise(pauses))
    # Its first tokens bring it back altogether.
    world.send(avoid=("b",))
    world.balancer.gave_tokens("a")
    assert world.balancer.next_pause_end() is None
    assert {world.send(avoid=("b",)) for _ in range(3)} == {"a"}


def test_one_that_proved_itself_anew_has_a_clean_record() -> None:
    world = World(1)
    world.fail("a", Trouble.AWAY)
    assert world.balancer.usable() == []
    world.balancer.serves("a", False)
    world.balancer.serves("a", True)
    world.balancer.reported("a", IDLE)
    assert world.balancer.usable() == ["a"]


def test_requests_are_at_fault_sooner_than_generators() -> None:
    world = World(1)
    for _ in range(2):
        world.fail("a", Trouble.FAULT)
    assert world.balancer.usable() == ["a"]
    world.balancer.gave_tokens("a")
    for _ in range(2):
        world.fail("a", Trouble.FAULT)
    assert world.balancer.usable() == ["a"]
    world.fail("a", Trouble.FAULT)
    assert world.balancer.usable() == []
    assert [(item.serving, item.set_aside) for item in world.balancer.standings()] == [(True, True)]
    for trouble in (Trouble.REQUEST, Trouble.LATE, Trouble.FULL):
        healthy = World(1)
        for _ in range(9):
            healthy.fail("a", trouble)
        assert healthy.balancer.usable() == ["a"]


def test_no_more_are_sent_than_it_takes() -> None:
    world = World(2, Report(0, 0, 4, 0.0))
    # As many as it decodes together, and one that is ready for the next place.
    assert sorted(world.send(str(number)) for number in range(10)) == [*"aaaaa", *"bbbbb"]
    assert world.balancer.choose(()) is None
    assert not world.balancer.has_room()
    world.balancer.ended("a")
    assert (world.balancer.choose(()), world.balancer.room("a"), world.balancer.room("b")) == ("a", 1, 0)


@pytest.mark.parametrize(
    ("report", "fits"),
    [
        (Report(16, 2, 16, 0.5), 1.0),
        # Two may wait.
        (Report(16, 4, 16, 0.5), 0.9),
        # All that wait do so for a version: there are places.
        (Report(2, 50, 16, 0.1), 1.0),
        # A full cache with nobody waiting is one that is well used.
        (Report(16, 0, 16, 0.99), 1.0),
        # It is its places that are used up, and one is ready for the next.
        (Report(16, 1, 16, 1.0), 1.0),
        # There are places, but nothing to put there: those that run need some room to grow.
        (Report(8, 2, 16, 0.96), 0.76),
        (Report(8, 12, 16, 0.9), 0.5),
    ],
)
def test_how_much_is_too_much(report: Report, fits: float) -> None:
    assert report.fits == pytest.approx(fits)


def test_the_limit_falls_by_shares_and_rises_by_steps() -> None:
    limit = Limit()
    limit.reported(Report(0, 0, 64, 0.0), 0)
    assert limit.value == 72
    # From what is out, and to what fits.
    limit.reported(Report(64, 16, 64, 0.5), 70)
    assert limit.value == 63
    # By no more than a fifth at once.
    limit.reported(Report(30, 70, 64, 1.0), 50)
    assert limit.value == 40
    # With room to spare it rises only for one who uses it all.
    limit.reported(Report(30, 0, 64, 0.3), 39)
    assert limit.value == 40
    limit.reported(Report(40, 0, 64, 0.3), 40)
    assert limit.value == 41
    for _ in range(100):
        limit.reported(Report(40, 0, 64, 0.3), limit.value)
    assert limit.value == 72
    for _ in range(100):
        limit.refused(72)
    # All refusals between two reports are one.
    assert limit.value == 57
    for _ in range(100):
        limit.reported(Report(1, 64, 64, 1.0), limit.value)
    assert limit.value == 1


@pytest.mark.parametrize("fit", [64, 20])
def test_actors_that_share_a_generator_come_to_equal_shares_of_it(fit: int) -> None:
    """Four actors that all want more than there is; the cache is room for `fit` requests."""
    slots, limits = 64, [Limit() for _ in range(4)]
    for limit, first in zip(limits, (60, 8, 4, 1), strict=True):
        limit.reported(Report(0, 0, slots, 0.0), 0)
        limit.reported(Report(slots, 1, slots, 1.0), 0)
        limit._limit = first
    totals = []
    for _ in range(600):
        out = [limit.value for limit in limits]
        totals.append(sum(out))
        running = min(slots, fit, sum(out))
        report = Report(running, sum(out) - running, slots, running / fit)
        for limit, ours in zip(limits, out, strict=True):
            limit.reported(report, ours)
    assert max(out) <= 2 * min(out)
    # Neither idle nor with a long queue.
    late = totals[100:]
    assert 0.85 * fit <= sum(late) / len(late) <= 1.2 * fit
    assert min(late) >= 0.7 * fit
    assert max(late) <= 1.3 * fit
