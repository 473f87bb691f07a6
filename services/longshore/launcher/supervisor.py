"""Units of processes on one machine: applied, watched, removed. Holds no policy and no file of its own.

A unit is a job, or the stack of shared services. It succeeds when a process that completes it exits with 0, and fails
when one of its processes is given up; either way its other processes are stopped. No unit's end touches another.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

import structlog

from longshore.errors import Conflict
from longshore.launcher.child import Child, Probe
from longshore.launcher.deaths import Rules
from longshore.launcher.ports import PortReservations
from longshore.launcher.spec import ProcessSpec, ProcessState, Ready, UnitState, UnitStatus

log = structlog.get_logger()


class _Unit:
    """One unit's processes and their common end."""

    def __init__(self, name: str, specs: Sequence[ProcessSpec]) -> None:
        self.name = name
        self.specs = tuple(specs)
        self.ports = PortReservations()
        self.children: list[Child] = []
        self.state = UnitState.RUNNING
        self.message = ""
        self.task: asyncio.Task[None] | None = None

    @property
    def status(self) -> UnitStatus:
        return UnitStatus(self.name, self.state, self.message, tuple(child.status for child in self.children))

    def resolved(self, spec: ProcessSpec) -> ProcessSpec:
        """The spec with real ports."""
        return dataclasses.replace(
            spec,
            env={name: self.ports.fill(value) for name, value in spec.env.items()},
            ready=Ready(spec.ready.kind, self.ports.fill(spec.ready.address)),
        )

    def stop(self) -> None:
        for child in self.children:
            child.stop()


class Supervisor:
    """Runs units of processes. Every method belongs to one event loop, in the thread that outlives the processes
    (on Linux they are killed when that thread ends)."""

    def __init__(self, probe: Probe, rules: Rules = Rules()) -> None:  # noqa: B008 - frozen
        self._probe = probe
        self._rules = rules
        self._units: dict[str, _Unit] = {}
        self._hurry = asyncio.Event()
        self._changed = asyncio.Event()
        self._closing = False

    def snapshot(self) -> list[UnitStatus]:
        """State of every unit, in the order in which they were applied."""
        return [unit.status for unit in self._units.values()]

    async def watch(self) -> AsyncIterator[list[UnitStatus]]:
        """The snapshot at once and after every change; a slow reader sees the newest, not each."""
        while True:
            changed = self._changed
            yield self.snapshot()
            await changed.wait()

    async def apply(self, name: str, specs: Sequence[ProcessSpec]) -> None:
        """Starts a unit; the same unit again changes nothing, whatever its state.

        Raises:
            Conflict: the unit has other processes, two of its processes share a name, or the supervisor is closing.
        """
        known = self._units.get(name)
        if known is not None:
            if known.specs != tuple(specs):
                raise Conflict(f"unit {name} is there with other processes; remove it first")
            return
        if self._closing:
            raise Conflict("the supervisor is shutting down")
        if len({spec.name for spec in specs}) != len(specs):
            raise Conflict(f"unit {name} names a process twice")
        unit = _Unit(name, specs)
        for spec in specs:
            child = Child(unit.resolved(spec), self._probe, self._rules, self._hurry)
            child.on_change = self._notify
            unit.children.append(child)
        self._units[name] = unit
        unit.task = asyncio.create_task(self._run(unit), name=f"unit-{name}")
        log.info("unit applied", unit=name, processes=[spec.name for spec in specs])

    async def remove(self, name: str, reason: str) -> None:
        """Stops a unit's processes and forgets it; returns once they are gone. Harmless when repeated."""
        unit = self._units.get(name)
        if unit is None:
            return
        log.info("unit removed", unit=name, reason=reason)
        await self._stop(unit)
        # Two callers may wait for one end; only the unit that was asked about is forgotten.
        if self._units.get(name) is unit:
            del self._units[name]
        self._notify()

    async def close(self, last: str) -> None:
        """Stops everything: all units together, then the unit `last` (the shared services), process by process in
        reverse order, so that the others can use it while they drain."""
        self._closing = True
        others = [unit for unit in self._units.values() if unit.name != last]
        await asyncio.gather(*(self._stop(unit) for unit in others))
        if last in self._units:
            await self._stop_in_order(self._units[last])
        self._notify()

    def hurry(self) -> None:
        """From now on nothing is given time to drain: what has to stop is killed."""
        self._hurry.set()

    async def _stop(self, unit: _Unit) -> None:
        unit.stop()
        assert unit.task is not None
        # Shielded: whoever gives up waiting must not leave processes behind.
        await asyncio.shield(unit.task)

    async def _stop_in_order(self, unit: _Unit) -> None:
        for child in reversed(unit.children):
            child.stop()
            while child.state not in (ProcessState.EXITED, ProcessState.GAVE_UP):
                await self._changed.wait()
        await self._stop(unit)

    async def _run(self, unit: _Unit) -> None:
        """Runs a unit's processes until the last one has ended."""
        tasks = {asyncio.create_task(child.run(), name=child.spec.name): child for child in unit.children}
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._settle(unit, tasks[task], task.result())
            if unit.state is not UnitState.RUNNING:
                unit.stop()
        unit.ports.close()
        self._notify()

    def _settle(self, unit: _Unit, child: Child, gave_up: str | None) -> None:
        """The first process that completes or is given up decides how the unit ended."""
        if unit.state is not UnitState.RUNNING:
            return
        if gave_up is not None:
            unit.state, unit.message = UnitState.FAILED, gave_up
            log.error("unit failed", unit=unit.name, reason=gave_up)
        elif child.spec.completes_unit and child.exit_code == 0:
            unit.state = UnitState.SUCCEEDED
            log.info("unit succeeded", unit=unit.name)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
