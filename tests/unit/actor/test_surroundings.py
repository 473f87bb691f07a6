"""Environments as the actor runs them: a plug-in that blocks or raises costs its own attempt alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from longshore.actor import surroundings
from longshore.actor.episode import AttemptFailed
from longshore.actor.surroundings import EnvironmentFactory
from longshore.tasks.environment import Observation, SingleTurn
from longshore.types import Message, Task

TASK = Task("t", (Message("user", "ab"),))


class Blocking:
    """Waits for the option `gate` in each step."""

    def __init__(self, options: dict[str, object]) -> None:
        gate = options["gate"]
        assert isinstance(gate, threading.Event)
        self._gate = gate
        self.made_in = threading.current_thread()

    def start(self, task: Task) -> list[Message]:
        return list(task.messages)

    def step(self, reply: str) -> Observation:
        if reply == "raise":
            raise KeyError("lost")
        if reply == "exit":
            sys.exit(3)
        if reply == "nothing":
            return None  # type: ignore[return-value]
        assert self._gate.wait(30)
        return Observation([], done=True, info={"main": threading.current_thread() is threading.main_thread()})


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_single_turn_is_called_in_place() -> None:
    factory = EnvironmentFactory(SingleTurn, {}, 5)
    world = factory()
    assert await world.start(TASK) == list(TASK.messages)
    assert (await world.step("x")).done


async def test_a_plugin_does_not_hold_up_the_loop(gate: threading.Event) -> None:
    factory = EnvironmentFactory(Blocking, {"gate": gate}, 30)
    world = factory()
    assert await world.start(TASK) == list(TASK.messages)
    step = asyncio.create_task(world.step("x"))
    # Would never be reached if the step blocked this thread.
    await asyncio.sleep(0.05)
    assert not step.done()
    gate.set()
    assert (await step).info == {"main": False}


async def test_a_plugin_that_hangs_or_raises_fails_its_attempt(gate: threading.Event) -> None:
    factory = EnvironmentFactory(Blocking, {"gate": gate}, 0.1)
    world = factory()
    await world.start(TASK)
    with pytest.raises(AttemptFailed, match=r"environment: it took longer than 0.1 s"):
        await world.step("x")
    with pytest.raises(AttemptFailed, match="environment: KeyError"):
        await world.step("raise")
    with pytest.raises(AttemptFailed, match=r"environment: RuntimeError.*SystemExit"):
        await world.step("exit")
    with pytest.raises(AttemptFailed, match="gave a NoneType, not an Observation"):
        await world.step("nothing")
    with pytest.raises(AttemptFailed, match="environment: KeyError"):
        await EnvironmentFactory(Blocking, {}, 30)().start(TASK)


async def test_threads_that_hang_stay_counted(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "MAX_THREADS", 2)
    factory = EnvironmentFactory(Blocking, {"gate": gate}, 0.2)
    worlds = [factory() for _ in range(3)]
    for world in worlds:
        await world.start(TASK)
    for world in worlds[:2]:
        with pytest.raises(AttemptFailed, match="longer"):
            await world.step("x")
    # Both threads hang: a third step waits for a place until its time is over.
    with pytest.raises(AttemptFailed, match="longer"):
        await worlds[2].step("raise")
    gate.set()
    with pytest.raises(AttemptFailed, match="KeyError"):
        await worlds[2].step("raise")


_HANGS = """
import asyncio, time
from longshore.actor.surroundings import EnvironmentFactory
from longshore.types import Task

class Hanging:
    def __init__(self, options): pass
    def start(self, task): time.sleep(600)

async def main():
    await EnvironmentFactory(Hanging, {}, 0.1)().start(Task("t", ()))

asyncio.run(main())
"""


def test_a_plugin_that_hangs_does_not_keep_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert "longer than 0.1 s" in done.stderr
