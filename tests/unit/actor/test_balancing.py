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
    ("report", "pressed"),
    [
        (Report(16, 2, 16, 0.5), False),
        (Report(16, 3, 16, 0.5), True),
        # All that wait do so for a version: there are places.
        (Report(2, 50, 16, 0.1), False),
        # A full cache with nobody waiting is one that is well used.
        (Report(16, 0, 16, 0.99), False),
        (Report(9, 1, 16, 0.96), True),
        # It is its places that are used up, and one is ready for the next.
        (Report(16, 1, 16, 1.0), False),
        (Report(9, 3, 16, 0.9), True),
    ],
)
def test_what_presses_a_generator(report: Report, pressed: bool) -> None:
    assert report.is_pressed is pressed


def test_the_limit_falls_by_shares_and_rises_by_steps() -> None:
    limit = Limit()
    limit.reported(Report(0, 0, 64, 0.0), 0)
    assert limit.value == 72
    limit.reported(Report(64, 40, 64, 0.97), 50)
    assert limit.value == 40
    limit.reported(Report(64, 40, 64, 0.97), 40)
    assert limit.value == 32
    # With room to spare it rises only for one who uses it all.
    limit.reported(Report(30, 0, 64, 0.3), 31)
    assert limit.value == 32
    limit.reported(Report(32, 0, 64, 0.3), 32)
    assert limit.value == 36
    for _ in range(100):
        limit.reported(Report(32, 0, 64, 0.3), limit.value)
    assert limit.value == 72
    for _ in range(100):
        limit.refused(72)
    # All refusals between two reports are one.
    assert limit.value == 57
    for _ in range(100):
        limit.reported(Report(64, 64, 64, 1.0), limit.value)
    assert limit.value == 1


def test_actors_that_share_a_generator_come_to_equal_shares_of_it() -> None:
    """Four actors that all want more than there is, the first of which has it all at first."""
    slots, limits = 64, [Limit() for _ in range(4)]
    out = [72, 0, 0, 0]
    for limit in limits:
        limit.reported(Report(0, 0, slots, 0.0), 0)
    waits = []
    for _ in range(400):
        out = [limit.value for limit in limits]
        total = sum(out)
        report = Report(min(slots, total), max(0, total - slots), slots, 0.5)
        waits.append(report.waiting)
        for limit, ours in zip(limits, out, strict=True):
            limit.reported(report, ours)
    assert max(out) <= 2 * min(out)
    late = waits[100:]
    # Always busy, and never with a long queue.
    assert all(-16 <= wait <= 24 for wait in late)
    assert sum(late) / len(late) < 16
