"""The gateway's one loop: each job that has a place has a driver, and no unit runs without a job."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from longshore.errors import NotFound, Unavailable
from longshore.gateway import metrics
from longshore.gateway.driver import JobDriver, Parts
from longshore.gateway.places import Limits, Use, Wish, place
from longshore.gateway.projects import Projects
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, wait_for_any
from longshore.launcher.plan import STACK_UNIT

log = structlog.get_logger()

# Changes wake the loop; this is for what other gateways and clocks do.
_LOOK_EVERY_S = 2.0
_GATHER_S = 0.05
_CANCEL_ROUNDS = 5


class Reconciler:
    """Runs drivers until told to stop. Jobs go on without it; the next one picks them up."""

    def __init__(self, parts: Parts, projects: Projects, room: Limits, jobs_since: float) -> None:
        """`room`: what all jobs together may take."""
        self._parts = parts
        self._projects = projects
        self._room = room
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
                # Many changes at once are one look: each goes through every job that has not ended.
                await wait_for_any(stop, timeout=_GATHER_S)
        finally:
            await _end([watching, *self._drivers.values()])

    async def _look(self) -> None:
        for job_id in [job_id for job_id, task in self._drivers.items() if task.done()]:
            # A driver that raised is a bug of ours: it ends this process, and the next one starts afresh.
            self._drivers.pop(job_id).result()
        jobs = [
            job
            for job in await self._parts.store.unfinished()
            if job.created_at >= self._jobs_since or job.state is JobState.CANCELLING
        ]
        placed = await self._placed(jobs)
        for job in jobs:
            if job.state.active and job.id in placed and job.id not in self._drivers:
                driver = JobDriver(job, self._parts)
                self._drivers[job.id] = asyncio.create_task(driver.run(self._stopping), name=f"job-{job.id}")
        metrics.JOBS_DRIVEN.set(len(self._drivers))
        await self._remove_strays()

    async def _placed(self, jobs: Sequence[Job]) -> set[str]:
        """The jobs that have a place, those that get one now included."""
        # One that was cancelled while it waited takes none: there is nothing of it to run.
        old = {job.id for job in jobs if job.id in self._drivers or job.state not in (JobState.QUEUED, JobState.PAUSED)}
        holding = [_wish(job) for job in jobs if job.id in old]
        waiting = [_wish(job) for job in jobs if job.id not in old and job.state is JobState.QUEUED]
        new = place(waiting, holding, await self._projects.quotas(), self._room) if waiting else []
        metrics.JOBS_WAITING.set(len(waiting) - len(new))
        return old.union(new)

    async def _remove_strays(self) -> None:
        """Removes units whose job has ended or was paused while no gateway was there to see it."""
        for unit in list(self._parts.units.current):
            if unit == STACK_UNIT or unit in self._drivers or not await self._is_at_rest(unit):
                continue
            try:
                await self._parts.launcher.remove(unit, "its job has ended, or is paused")
            except Unavailable as error:
                log.warning("stray unit", unit=unit, reason=str(error))

    async def _is_at_rest(self, unit: str) -> bool:
        try:
            return not (await self._parts.store.get(unit)).state.active
        except NotFound:
            return True


def _wish(job: Job) -> Wish:
    return Wish(job.id, job.project, job.queued_at, Use(1, job.generators, job.gpus))


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
