"""What a fleet makes of what workers answer; the workers are fakes. tests/integration/test_fleet.py has real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from longshore.errors import Rejected
from longshore.launcher.fleet import Fleet
from longshore.launcher.spec import ProcessSpec, Ready, ReadyKind, UnitState, UnitStatus


class RefusingWorker:
    """A worker that is there, and takes nothing."""

    def __init__(self, address: str) -> None:
        self.asked = 0

    async def apply(self, unit: str, specs: Sequence[ProcessSpec]) -> None:
        self.asked += 1
        raise Rejected("environment", "LD_PRELOAD is no setting of a process")

    async def remove(self, unit: str, reason: str) -> None:
        """There is nothing."""

    async def watch(self) -> AsyncIterator[dict[str, UnitStatus]]:
        yield {}
        await asyncio.Event().wait()

    async def close(self) -> None:
        """There is nothing."""


async def test_what_a_worker_will_never_run_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "actor.4.host.worker").touch()
    fleet = Fleet(tmp_path, RefusingWorker)
    spec = ProcessSpec("actor-0", "actor", (), {"LD_PRELOAD": "x"}, tmp_path / "log", Ready(ReadyKind.GRPC, "x"))
    async with asyncio.timeout(10):
        watching = fleet.watch()
        assert await anext(watching) == {}
        await fleet.apply("job", [spec])
        async for units in watching:
            if units["job"].state is not UnitState.RUNNING:
                break
        await watching.aclose()
    assert (units["job"].state, "LD_PRELOAD" in units["job"].message) == (UnitState.FAILED, True)
