"""One worker as the fleet sees it: what it says it runs, for as long as it says anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from longshore.errors import Unavailable
from longshore.launcher.spec import ProcessSpec, ProcessState, ProcessStatus, UnitState, UnitStatus
from longshore.launcher.worker_sockets import WorkerName

RETRY_S = 0.3
_CLOSE_S = 5.0


class Link(Protocol):
    """A supervisor's client; each method raises Unavailable while it is away."""

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None: ...

    async def remove(self, unit: str, reason: str) -> None: ...

    def watch(self) -> AsyncIterator[dict[str, UnitStatus]]: ...

    async def close(self) -> None: ...


class WorkerLink:
    """Follows one worker. Its units are JOB/PROCESS; seen from here, a job has named processes."""

    def __init__(self, name: WorkerName, client: Link, on_news: Callable[[], None]) -> None:
        self.service, self.places, self.host = name.service, name.places, name.host
        # What it said last; None while it is away.
        self.units: dict[tuple[str, str], UnitStatus] | None = None
        self._client = client
        self._on_news = on_news
        self._away_since = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        # What ran when it went away.
        self._missing: set[tuple[str, str]] = set()

    @property
    def away_s(self) -> float:
        """Seconds since it was heard of last; 0 while it is there."""
        return time.monotonic() - self._away_since if self.units is None else 0.0

    def open(self) -> None:
        self._task = asyncio.create_task(self._follow(), name=f"worker-{self.service}-{self.host}")

    def check(self) -> None:
        """Raises what ended the following: a bug of ours."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def close(self) -> None:
        """Stops following; what it runs goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)
        self._set_away()
        await self._client.close()

    def processes(self, unit: str) -> dict[str, UnitStatus]:
        """Of a job, by name."""
        return {name: status for (job, name), status in (self.units or {}).items() if job == unit}

    def held(self) -> set[tuple[str, str]]:
        """(job, process) of all that it knows."""
        return set(self.units or {})

    def running(self) -> set[tuple[str, str]]:
        """(job, process) of all that takes a place."""
        return {key for key, status in (self.units or {}).items() if status.state is UnitState.RUNNING}

    def lost(self, unit: str, process: str) -> bool:
        """Whether a process went with an earlier life of the worker; True once a loss."""
        key = (unit, process)
        found = key in self._missing and key not in (self.units or {})
        self._missing.discard(key)
        return found

    async def apply(self, unit: str, spec: ProcessSpec) -> None:
        """Raises Rejected, Conflict or Unavailable."""
        await self._client.apply(f"{unit}/{spec.name}", [spec])
        if self.units is not None and (unit, spec.name) not in self.units:
            # Until the worker says so itself, so that it is not given out twice.
            process = ProcessStatus(spec.name, ProcessState.STARTING, 0, 0, None, str(spec.log_path))
            started = UnitStatus(f"{unit}/{spec.name}", UnitState.RUNNING, "", (process,))
            self.units = {**self.units, (unit, spec.name): started}

    async def remove(self, unit: str, process: str, reason: str) -> None:
        """Returns once the process is gone. Raises Unavailable."""
        await self._client.remove(f"{unit}/{process}", reason)
        if self.units is not None:
            self.units = {key: status for key, status in self.units.items() if key != (unit, process)}

    async def _follow(self) -> None:
        while True:
            try:
                async for said in self._client.watch():
                    self.units = {_key(name): status for name, status in said.items()}
                    self._on_news()
            except Unavailable:
                pass
            self._set_away()
            await asyncio.sleep(RETRY_S)

    def _set_away(self) -> None:
        if self.units is not None:
            self._missing |= self.running()
            self.units, self._away_since = None, time.monotonic()
            self._on_news()


def _key(name: str) -> tuple[str, str]:
    job, _, process = name.rpartition("/")
    return job, process
