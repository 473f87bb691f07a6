"""The gateway's one loop: each job that has not ended has a driver, and no unit runs without a job."""

from __future__ import annotations

import asyncio

import structlog

from longshore.errors import NotFound, Unavailable
from longshore.gateway import metrics
from longshore.gateway.driver import JobDriver, Parts
from longshore.gateway.states import JobState
from longshore.gateway.store import wait_for_any
from longshore.launcher.plan import STACK_UNIT

log = structlog.get_logger()

# Changes wake the loop; this is for what other gateways and clocks do.
_LOOK_EVERY_S = 2.0
_CANCEL_ROUNDS = 5


class Reconciler:
    """Runs drivers until told to stop. Jobs go on without it; the next one picks them up."""

    def __init__(self, parts: Parts, jobs_since: float) -> None:
        self._parts = parts
        self._jobs_since = jobs_since
        self._drivers: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Returns soon after `stop` is set."""
        self._stopping = stop
        watching = asyncio.create_task(self._parts.units.run())
        try:
            # Before the launcher has told what runs, nothing can be said to be missing.
            await wait_for_any(self._parts.units.known, stop, timeout=None)
            while not stop.is_set():
                changed = self._parts.store.changed()
                try:
                    await self._look()
                except Unavailable as error:
                    log.warning("jobs cannot be looked at", reason=str(error))
                await wait_for_any(changed, stop, timeout=_LOOK_EVERY_S)
        finally:
            await _end([watching, *self._drivers.values()])

    async def _look(self) -> None:
        for job_id in [job_id for job_id, task in self._drivers.items() if task.done()]:
            # A driver that raised is a bug of ours: it ends this process, and the next one starts afresh.
            self._drivers.pop(job_id).result()
        for job in await self._parts.store.unfinished():
            ours = job.created_at >= self._jobs_since or job.state is JobState.CANCELLING
            if ours and job.id not in self._drivers:
                driver = JobDriver(job, self._parts)
                self._drivers[job.id] = asyncio.create_task(driver.run(self._stopping), name=f"job-{job.id}")
        metrics.JOBS_DRIVEN.set(len(self._drivers))
        await self._remove_strays()

    async def _remove_strays(self) -> None:
        """Removes units whose job has ended while no gateway was there to see it."""
        for unit in list(self._parts.units.current):
            if unit == STACK_UNIT or unit in self._drivers or not await self._has_ended(unit):
                continue
            try:
                await self._parts.launcher.remove(unit, "its job has ended")
            except Unavailable as error:
                log.warning("stray unit", unit=unit, reason=str(error))

    async def _has_ended(self, unit: str) -> bool:
        try:
            return (await self._parts.store.get(unit)).state.ended
        except NotFound:
            return True


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits for them. Cancels again what goes on: until Python 3.12, a cancellation that comes just
    as a wait with a timeout is over can be lost in the library that waited."""
    pending = set(tasks)
    for _ in range(_CANCEL_ROUNDS):
        for task in pending:
            task.cancel()
        if pending:
            _, pending = await asyncio.wait(pending, timeout=1.0)
    for task in pending:
        log.error("task did not end", task=task.get_name())
