"""Waiting for a place: in order, without delay, within bounds. The balancer is real, the clock is ours."""

from __future__ import annotations

import asyncio
import random

import pytest

from longshore.actor import dispatch as module
from longshore.actor.balancing import Balancer, Trouble
from longshore.actor.dispatch import Dispatch
from longshore.actor.limit import Report
from longshore.errors import Unavailable

FAR = 1e9


class Desk:
    """One generator with two places, "g"; and another, "h", that may be opened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.balancer = Balancer(lambda: self.now, random.Random(1))
        self.dispatch = Dispatch(self.balancer, lambda: self.now)

    def open(self, name: str) -> None:
        self.balancer.join(name)
        self.balancer.serves(name, True)
        # One that is decoded, and one that is ready for the place.
        self.balancer.reported(name, Report(0, 0, 1, 0.0))
        self.dispatch.wake()

    def ask(self, *avoid: str, until: float = FAR, patience_s: float = FAR) -> asyncio.Task[str]:
        return asyncio.create_task(self.dispatch.place((), avoid, until, patience_s))


async def settled(*tasks: asyncio.Task[str]) -> list[bool]:
    for _ in range(5):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_places_go_to_who_came_first_and_at_once() -> None:
    desk = Desk()
    asked = [desk.ask() for _ in range(4)]
    assert await settled(*asked) == [False] * 4
    desk.open("g")
    assert await settled(*asked) == [True, True, False, False]
    assert desk.dispatch.num_waiting == 2
    desk.dispatch.ended("g")
    assert await settled(*asked) == [True, True, True, False]
    # Who cannot go where there is room lets others pass.
    desk.open("h")
    assert (await asked[3], await desk.ask("g")) == ("h", "h")
    picky = desk.ask("g")
    gone = desk.ask()
    late = desk.ask()
    assert await settled(gone) == [False]
    gone.cancel()
    desk.dispatch.ended("g")
    assert await settled(picky, late) == [False, True]
    desk.dispatch.ended("h")
    assert await picky == "h"


async def test_who_avoids_one_goes_there_when_no_other_is_left() -> None:
    desk = Desk()
    desk.open("g")
    desk.open("h")
    await asyncio.gather(desk.ask("g"), desk.ask("g"))
    # The other one is full, and may have room soon.
    asked = desk.ask("g")
    assert await settled(asked) == [False]
    desk.balancer.serves("h", False)
    desk.dispatch.wake()
    assert await settled(asked) == [True]
    assert await asked == "g"


async def test_who_leaves_gives_back_what_had_just_been_given() -> None:
    desk = Desk()
    leaving = desk.ask()
    assert await settled(leaving) == [False]
    desk.open("g")
    assert [standing.outstanding for standing in desk.balancer.standings()] == [1]
    # It has its place, and is told to leave before it knows.
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert [standing.outstanding for standing in desk.balancer.standings()] == [0]
    assert desk.dispatch.num_waiting == 0


async def test_the_end_of_a_pause_is_seen_by_itself() -> None:
    desk = Desk()
    desk.open("g")
    desk.balancer.sent("g", ())
    desk.dispatch.ended("g", Trouble.AWAY)
    asked = desk.ask()
    assert await settled(asked) == [False]
    pause = desk.balancer.next_pause_end()
    assert pause is not None
    desk.now += pause
    async with asyncio.timeout(5):
        assert await asked == "g"


async def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    desk = Desk()
    desk.open("g")
    await asyncio.gather(desk.ask(), desk.ask())
    asked = desk.ask(until=10.0, patience_s=1.0)
    await settled(asked)
    desk.now = 9.0
    await asyncio.sleep(0.05)
    # There is a generator, only without room.
    assert not asked.done()
    desk.now = 10.0
    with pytest.raises(Unavailable, match="within the time that a reply may take"):
        await asked
    # Nobody serves: patience counts from when the request came, if that was later.
    desk.balancer.serves("g", False)
    desk.dispatch.wake()
    desk.now = 100.0
    asked = desk.ask(patience_s=5.0)
    await settled(asked)
    desk.now = 104.0
    await asyncio.sleep(0.05)
    assert not asked.done()
    desk.now = 105.0
    with pytest.raises(Unavailable, match="no generator has been serving for 5 s"):
        await asked
