"""Does what the schedule says to the processes of a world, and notes what came of each fault.

A fault is due at its time; it waits while its target is not ready, for the supervisor rightly gives up a process that
dies again and again without becoming ready, and others go first meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from chaos.broker_tap import BrokerTap
from chaos.schedule import KILLS, Fault, Kind
from chaos.world import Machine, alive
from longshore.launcher.spec import ProcessStatus

TICK_S = 0.05
# The supervisor gives up a process after 20 deaths in a row, each within 60 s of its start.
SHORT_LIFE_S = 62.0
MAX_SHORT_LIVES = 12
# What a machine loses of a file that is synced once a second.
LOST_S = 1.0
DIE_S = 5.0
RECOVER_S = 120.0


@dataclass
class Outcome:
    """What came of one fault; times in seconds."""

    fault: Fault
    done_at: float
    late_s: float
    # Until the target was ready again.
    ready_s: float | None = None
    # Until a train step was recorded that had not been before.
    step_s: float | None = None
    note: str = ""


@dataclass
class _Life:
    """How often in a row a process was killed soon after its start."""

    short: int = 0
    killed_at: float = field(default_factory=lambda: -SHORT_LIFE_S)


# Begins something; what it returns ends it.
Begin = Callable[[], Awaitable[Callable[[], Awaitable[None]]]]
GONE = "was gone"


class Executor:
    """Runs one schedule."""

    def __init__(
        self,
        machines: Sequence[Machine],
        faults: Sequence[Fault],
        taps: Mapping[str, BrokerTap],
        places: Mapping[str, Begin],
    ) -> None:
        """`taps`: by name of the broker's process. `places`: by name of the link or disk. Both, and `machines`, may
        change between two jobs."""
        self.outcomes: list[Outcome] = []
        self._machines = machines
        self._due = list(faults)
        self._taps = taps
        self._places = places
        self._lives: dict[str, _Life] = {}
        # Targets that are not to be touched; and those of them that a fault holds for a time.
        self._busy: set[str] = set()
        self._held: set[str] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._clock = 0.0

    @property
    def left(self) -> int:
        return len(self._due)

    async def run(self, active: Callable[[], bool], allowed: Callable[[Fault], bool]) -> None:
        """Does what is due and allowed for as long as `active`; the clock stands still between two calls."""
        before = time.monotonic()
        while self._due and active():
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self._clock += now - before
            before = now
            due = (item for item in self._due if item.at_s <= self._clock)
            fault = next((item for item in due if allowed(item) and self._possible(item)), None)
            if fault is not None:
                self._due.remove(fault)
                await self._do(fault)

    async def settle(self) -> None:
        """Until what lasts is over, and what was stopped or cut goes on."""
        if self._running:
            await asyncio.wait(self._running)
        for task in self._running:
            task.result()

    def stepped(self, at: float) -> None:
        """Told when a train step was recorded for the first time."""
        for outcome in self.outcomes:
            if outcome.step_s is None and outcome.done_at < at:
                outcome.step_s = at - outcome.done_at

    def _possible(self, fault: Fault) -> bool:
        if fault.target in self._busy:
            return False
        if fault.kind is Kind.MACHINE:
            return not self._held and any(machine.name == fault.target and machine.units for machine in self._machines)
        if fault.kind in (Kind.PARTITION, Kind.DISK_FULL):
            return fault.target in self._places
        life = self._lives.get(fault.target, _Life())
        if fault.kind in KILLS and life.short >= MAX_SHORT_LIVES and time.monotonic() - life.killed_at < SHORT_LIFE_S:
            return False
        return any(machine.ready(fault.target) for machine in self._machines)

    def _machine_of(self, name: str) -> Machine | None:
        return next((machine for machine in self._machines if machine.process(name) is not None), None)

    def _process(self, name: str) -> ProcessStatus | None:
        machine = self._machine_of(name)
        return machine.process(name) if machine else None

    async def _do(self, fault: Fault) -> None:
        outcome = Outcome(fault, time.monotonic(), max(0.0, self._clock - fault.at_s))
        self.outcomes.append(outcome)
        if fault.kind is Kind.MACHINE:
            # Everything waits: there is nobody left to do anything to.
            await self._kill_machine(outcome)
            return
        lasting = {Kind.STOP: self._stop, Kind.PARTITION: self._at_place, Kind.DISK_FULL: self._at_place}
        act = lasting.get(fault.kind, self._kill)
        self._busy.add(fault.target)
        if fault.kind in lasting:
            self._held.add(fault.target)
        task = asyncio.create_task(self._guarded(act, outcome))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _guarded(self, act: Callable[[Outcome], Awaitable[None]], outcome: Outcome) -> None:
        try:
            await act(outcome)
        finally:
            self._busy.discard(outcome.fault.target)
            self._held.discard(outcome.fault.target)

    async def _kill(self, outcome: Outcome) -> None:
        name = outcome.fault.target
        machine, process = self._machine_of(name), self._process(name)
        if machine is None or process is None or not process.pid:
            outcome.note = GONE
            return
        life = self._lives.setdefault(name, _Life())
        now = time.monotonic()
        life.short = life.short + 1 if now - life.killed_at < SHORT_LIFE_S else 1
        life.killed_at = now
        _signal(process.pid, signal.SIGKILL)
        if outcome.fault.kind is Kind.TAIL_LOSS:
            await _gone(process.pid)
            # The supervisor starts it again after half a second at the earliest.
            loss = await asyncio.to_thread(self._taps[name].lose_tail, LOST_S)
            outcome.note = f"lost {loss.size} bytes, {loss.seconds:.1f} s" if loss else "nothing to lose"
        await self._await_ready(outcome, machine, process.restarts)

    async def _await_ready(self, outcome: Outcome, machine: Machine, restarts: int) -> None:
        deadline, lives = outcome.done_at + RECOVER_S, machine.lives
        while time.monotonic() < deadline:
            await asyncio.sleep(TICK_S)
            if machine.lives != lives:
                outcome.note = outcome.note or "its machine was killed before it was back"
                return
            process = machine.process(outcome.fault.target)
            if process is None:
                outcome.note = outcome.note or "its job ended"
                return
            if process.restarts > restarts and machine.ready(outcome.fault.target):
                outcome.ready_s = time.monotonic() - outcome.done_at
                return

    async def _kill_machine(self, outcome: Outcome) -> None:
        machine = next(item for item in self._machines if item.name == outcome.fault.target)
        names = [process.name for unit in machine.units.values() for process in unit.processes]
        for name in names:
            self._lives.pop(name, None)
        await machine.kill()
        deadline = outcome.done_at + RECOVER_S
        while time.monotonic() < deadline:
            await asyncio.sleep(TICK_S)
            if all(machine.ready(name) for name in names):
                outcome.ready_s = time.monotonic() - outcome.done_at
                return

    async def _stop(self, outcome: Outcome) -> None:
        process = self._process(outcome.fault.target)
        if process is None or not process.pid:
            outcome.note = GONE
            return
        _signal(process.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(outcome.fault.seconds)
        finally:
            _signal(process.pid, signal.SIGCONT)
        outcome.ready_s = outcome.fault.seconds

    async def _at_place(self, outcome: Outcome) -> None:
        end = await self._places[outcome.fault.target]()
        try:
            await asyncio.sleep(outcome.fault.seconds)
        finally:
            await end()
        outcome.ready_s = outcome.fault.seconds


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def _gone(pid: int) -> None:
    deadline = time.monotonic() + DIE_S
    while time.monotonic() < deadline:
        if not alive(pid):
            return
        await asyncio.sleep(0.002)
