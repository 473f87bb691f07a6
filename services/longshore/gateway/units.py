"""The newest state of every unit, as the launcher tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import structlog

from longshore.errors import Unavailable
from longshore.launcher.spec import ProcessSpec, UnitStatus

log = structlog.get_logger()

_RETRY_S = 0.5


class Launcher(Protocol):
    """What runs processes: the local supervisor, later a cluster. Each method raises Unavailable while it is away."""

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None:
        """Starts a unit; the same one again changes nothing. Raises Conflict or Rejected."""

    async def remove(self, unit: str, reason: str) -> None:
        """Stops a unit and forgets it; returns once its processes are gone."""

    def watch(self) -> AsyncIterator[dict[str, UnitStatus]]:
        """Every unit's state, at once and on every change."""


class Units:
    """Follows a launcher's watch for as long as `run` runs."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.current: dict[str, UnitStatus] = {}
        # Set once the launcher has told the first time.
        self.known = asyncio.Event()

    def get(self, unit: str) -> UnitStatus | None:
        return self.current.get(unit)

    async def run(self) -> None:
        """Follows until cancelled, through the launcher's absences."""
        while True:
            try:
                async for units in self._launcher.watch():
                    self.current = units
                    self.known.set()
            except Unavailable as error:
                log.warning("launcher lost", reason=str(error))
            await asyncio.sleep(_RETRY_S)
