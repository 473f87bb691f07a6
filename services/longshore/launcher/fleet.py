"""The launcher over workers: the processes of a job are shared out among containers that wait for jobs.

    consumes   what drivers apply and remove, what each worker says it runs       waits for     news, 1 s at most
    produces   single processes applied at and removed from workers, unit states  unblocked by  workers, drivers

It keeps nothing on disk. A gateway that starts anew applies its jobs again, and what runs already is found at the
workers by its name and left alone. A process whose worker has died is given to that worker again when it comes back,
or after a while to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from longshore.errors import Busy, Conflict, LongshoreError, Rejected, Unavailable
from longshore.launcher.spec import ProcessSpec, ProcessState, ProcessStatus, UnitState, UnitStatus
from longshore.launcher.worker_link import Link, WorkerLink
from longshore.launcher.worker_sockets import find_workers, on_sockets

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
# A worker's container is back within a second or two; then its process goes on where its files are warm.
MOVE_AFTER_S = 5.0
# For every worker to say what it runs, before a gateway that has just started may say what does not run.
FIRST_LOOK_S = 3.0


@dataclass
class _Unit:
    """What a driver wants to run, and where each process of it was put."""

    specs: tuple[ProcessSpec, ...]
    places: dict[str, WorkerLink] = field(default_factory=dict)
    # Processes that were found without a worker: how often.
    moves: dict[str, int] = field(default_factory=dict)
    # How it ended; its other processes are then stopped.
    end: UnitStatus | None = None


class Fleet:
    """Implements the gateway's launcher. All of its work is done while somebody iterates over `watch`."""

    def __init__(self, folder: Path, connect: Callable[[str], Link]) -> None:
        """
        Args:
            folder: where the workers' sockets are.
            connect: makes the client of one worker's address.
        """
        self._folder = folder
        self._connect = connect
        self._links: dict[Path, WorkerLink] = {}
        self._units: dict[str, _Unit] = {}
        self._news = asyncio.Event()

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None:
        """Gives each process a place; they are started soon after. The same unit again changes nothing.

        Raises:
            Conflict: the unit is there with other processes, or two of them share a name.
            Busy: the workers that are there have no room for all of them.
        """
        placed = tuple(on_sockets(spec, unit, self._folder) for spec in specs)
        known = self._units.get(unit)
        if known is not None:
            if known.specs != placed:
                raise Conflict(f"unit {unit} is there with other processes; remove it first")
            return
        if len({spec.name for spec in specs}) != len(specs):
            raise Conflict(f"unit {unit} names a process twice")
        wanted = _Unit(placed)
        self._units[unit] = wanted
        try:
            for spec in placed:
                wanted.places[spec.name] = self._holder(unit, spec.name) or self._choose(spec.service)
        except Busy:
            del self._units[unit]
            raise
        log.info("unit applied", unit=unit, workers={name: link.host for name, link in wanted.places.items()})
        self._news.set()

    async def remove(self, unit: str, reason: str) -> None:
        """Stops a unit's processes and forgets it. Raises Unavailable when a worker did not stop its own."""
        self._units.pop(unit, None)
        log.info("unit removed", unit=unit, reason=reason)
        held = [(link, name) for link in self._links.values() for name in link.processes(unit)]
        await asyncio.gather(*(link.remove(unit, name, reason) for link, name in held))
        self._news.set()

    async def watch(self) -> AsyncIterator[dict[str, UnitStatus]]:
        """Every unit's state, at once and on every change."""
        last: dict[str, UnitStatus] | None = None
        try:
            await self._first_look()
            while True:
                self._news.clear()
                await self._find()
                for unit, wanted in list(self._units.items()):
                    await self._settle(unit, wanted)
                now = self._statuses()
                if now != last:
                    last = now
                    yield now
                await self._await_news(LOOK_EVERY_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """Lets go of the workers; what they run goes on."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            await link.close()

    async def _first_look(self) -> None:
        deadline = time.monotonic() + FIRST_LOOK_S
        await self._find()
        while any(link.units is None for link in self._links.values()) and time.monotonic() < deadline:
            self._news.clear()
            await self._await_news(deadline - time.monotonic())

    async def _await_news(self, seconds: float) -> None:
        # Not wait_for, which until Python 3.12 may lose a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    async def _find(self) -> None:
        """Opens a link to each new worker, and drops those whose socket is gone."""
        try:
            found = await asyncio.to_thread(find_workers, self._folder)
        except OSError as error:
            raise Unavailable(f"the workers' folder {self._folder} cannot be read: {error.strerror}") from None
        for path in [path for path in self._links if path not in found]:
            await self._links.pop(path).close()
        for path, name in found.items():
            if path not in self._links:
                link = WorkerLink(name, self._connect(f"unix:{path}"), self._news.set)
                self._links[path] = link
                link.open()
        for link in self._links.values():
            link.check()

    async def _settle(self, unit: str, wanted: _Unit) -> None:
        """Brings one unit a step nearer to what it should be; what fails is tried again at the next look."""
        status = self._status(unit, wanted)
        if status.state is not UnitState.RUNNING:
            wanted.end = status
        work = []
        for spec in wanted.specs:
            holders = [link for link in self._links.values() if spec.name in link.processes(unit)]
            if wanted.end is not None:
                work += [link.remove(unit, spec.name, "the unit has ended") for link in holders]
                continue
            place = self._place(unit, wanted, spec, holders)
            work += [link.remove(unit, spec.name, "it runs elsewhere") for link in holders if link is not place]
            if place is not None and place not in holders:
                work.append(place.apply(unit, spec))
        for result in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(result, Rejected) and wanted.end is None:
                # It would say so for ever: the next look stops what runs of the unit.
                wanted.end = UnitStatus(unit, UnitState.FAILED, f"a worker refuses it: {result}", status.processes)
            if isinstance(result, LongshoreError):
                log.warning("worker", unit=unit, reason=str(result))
            elif isinstance(result, BaseException):
                raise result

    def _place(self, unit: str, wanted: _Unit, spec: ProcessSpec, holders: list[WorkerLink]) -> WorkerLink | None:
        """Where a process is or belongs; None while its worker is awaited or no other has room."""
        place = wanted.places[spec.name]
        if place in holders:
            return place
        if holders:
            wanted.places[spec.name] = holders[0]
            return holders[0]
        if place.lost(unit, spec.name):
            wanted.moves[spec.name] = wanted.moves.get(spec.name, 0) + 1
        if place.units is None:
            if place.away_s < MOVE_AFTER_S:
                return None
            try:
                place = self._choose(spec.service)
            except Busy:
                return None
            log.warning("process moves", unit=unit, process=spec.name, to=place.host)
            wanted.places[spec.name] = place
        return place

    def _choose(self, service: str) -> WorkerLink:
        """The worker of a service with the most free places. Raises Busy."""
        fit = [link for link in self._links.values() if link.service == service and link.units is not None]
        free = {id(link): link.places - self._load(link) for link in fit}
        best = max(fit, key=lambda link: free[id(link)], default=None)
        if best is None:
            raise Busy(f"no worker waits for {service} processes: start one with `longshore wait {service}`")
        if free[id(best)] <= 0:
            raise Busy(f"each of the {sum(link.places for link in fit)} places for {service} processes is taken")
        return best

    def _load(self, link: WorkerLink) -> int:
        taken = {
            (unit, name)
            for unit, wanted in self._units.items()
            for name, place in wanted.places.items()
            if place is link and wanted.end is None
        }
        return len(taken | link.running())

    def _holder(self, unit: str, process: str) -> WorkerLink | None:
        return next((link for link in self._links.values() if process in link.processes(unit)), None)

    def _statuses(self) -> dict[str, UnitStatus]:
        """Of every unit that is wanted, and of those that only workers know: of jobs that ended without a gateway."""
        found = {unit: self._status(unit, wanted) for unit, wanted in self._units.items()}
        for link in self._links.values():
            for unit, name in link.held():
                if unit in self._units:
                    continue
                said = link.processes(unit)[name]
                before = found.get(unit, UnitStatus(unit, UnitState.RUNNING))
                found[unit] = UnitStatus(unit, UnitState.RUNNING, "", before.processes + said.processes)
        return found

    def _status(self, unit: str, wanted: _Unit) -> UnitStatus:
        if wanted.end is not None:
            return wanted.end
        processes: list[ProcessStatus] = []
        ends: list[UnitStatus] = []
        for spec in wanted.specs:
            moves = wanted.moves.get(spec.name, 0)
            holder = self._holder(unit, spec.name)
            if holder is None:
                waits = ProcessState.BACKOFF if moves else ProcessState.STARTING
                processes.append(ProcessStatus(spec.name, waits, 0, moves, None, str(spec.log_path)))
                continue
            said = holder.processes(unit)[spec.name]
            ends += [said] if said.state is not UnitState.RUNNING else []
            processes += [_renamed(process, moves) for process in said.processes]
        # A learner that is done outweighs what died beside it.
        end = next((said for said in ends if said.state is UnitState.SUCCEEDED), ends[0] if ends else None)
        state = end.state if end else UnitState.RUNNING
        return UnitStatus(unit, state, end.message if end else "", tuple(processes))


def _renamed(process: ProcessStatus, moves: int) -> ProcessStatus:
    """A process with the lives counted that it had at workers before."""
    return ProcessStatus(
        process.name, process.state, process.pid, process.restarts + moves, process.exit_code, process.log_path
    )
