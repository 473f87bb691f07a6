"""Takes one job from its place to its end or a pause: has it started, stores its events, watches its processes.

    consumes   the job's row, its broker events, its unit's state     waits for     broker events (300 ms at most)
    produces   the launcher's unit, state moves and events in SQL     unblocked by  learner, launcher, `cancel`

It may die at any line: another one goes on from the row, because every act here can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from longshore.errors import Busy, Conflict, LongshoreError, Unavailable
from longshore.gateway.states import LEARNER_EVENTS, Body, JobState
from longshore.gateway.store import Job, JobStore
from longshore.gateway.units import Launcher, Units
from longshore.launcher.spec import ProcessSpec, ProcessState, UnitState, UnitStatus
from longshore.rollout_queue.channel import JobChannel

log = structlog.get_logger()

BLOCK_MS = 300
READ_COUNT = 200
RETRY_S = 1.0
# To get a job's processes started while the weight store or the launcher is away.
START_TIMEOUT_S = 300.0
# The learner's time to end a cancelled job by itself, with its books in order.
CANCEL_GRACE_S = 30.0

_TOLD = {ProcessState.READY: "ready", ProcessState.BACKOFF: "restarting"}


@dataclass(frozen=True)
class Parts:
    """What every driver of a gateway shares."""

    store: JobStore
    launcher: Launcher
    units: Units
    # Prepares a job (files, key, weight store) and plans its processes. Raises Unavailable, OSError.
    prepare: Callable[[Job], Awaitable[Sequence[ProcessSpec]]]
    channel: Callable[[Job], JobChannel]
    # Drops what the broker keeps of a job that has ended. Raises Unavailable.
    forget: Callable[[Job], Awaitable[None]]


class JobDriver:
    """Drives one job. One instance a job and gateway process."""

    def __init__(self, job: Job, parts: Parts) -> None:
        self._job = job
        self._parts = parts
        self._store = parts.store
        self._channel = parts.channel(job)
        self._started = time.monotonic()
        self._applied = False
        self._cancelled_at: float | None = None
        # Process -> (state, restarts) last told of; a driver that takes over a running job tells only news.
        self._told: dict[str, tuple[ProcessState, int]] = {}
        self._tell_first = job.state is JobState.QUEUED

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when the job has ended or is paused and nothing of it runs, or soon after `stop` is set."""
        while self._job.state.active:
            if stop.is_set():
                return
            try:
                await self._turn_or_fail()
            except Unavailable as error:
                log.warning("waiting", job=self._job.id, reason=str(error))
                with contextlib.suppress(Unavailable):
                    await self._check_start_deadline(error)
                await asyncio.sleep(RETRY_S)
        if self._job.state.ended:
            await self._clean_up()

    async def _turn_or_fail(self) -> None:
        """Raises Unavailable alone: nothing can be said of the job meanwhile, not even that it failed."""
        try:
            await self._turn()
        except Unavailable:
            raise
        except (LongshoreError, OSError) as error:
            await self._fail(str(error))
        except Exception as error:
            # The job's boundary: one job's bug must not end the gateway under the others.
            log.error("driver failed", job=self._job.id, exc_info=error)
            await self._fail("internal error; see the gateway's log")

    async def _turn(self) -> None:
        self._job = await self._store.get(self._job.id)
        if self._job.state is JobState.PAUSING:
            await self._pause()
            return
        if self._job.state is JobState.CANCELLING:
            await self._command_cancel()
        elif not self._applied:
            await self._start()
        await self._store_events(BLOCK_MS)
        unit = self._parts.units.get(self._job.id)
        await self._tell_processes(unit)
        await self._advance(unit)

    async def _start(self) -> None:
        specs = await self._parts.prepare(self._job)
        await self._parts.launcher.apply(self._job.id, specs)
        self._applied = True
        if self._job.state is JobState.QUEUED:
            await self._move(JobState.STARTING)

    async def _pause(self) -> None:
        """Has the processes stopped: SIGTERM makes the learner write a checkpoint. What it said last is stored."""
        unit = self._parts.units.get(self._job.id)
        if unit is not None and unit.state is not UnitState.RUNNING:
            # It ended by itself before it could be paused.
            await self._advance(unit)
            return
        await self._parts.launcher.remove(self._job.id, "paused")
        self._applied = False
        while await self._store_events(0):
            pass
        # One that ended in order while it was being stopped has said so.
        ended = self._job.progress.get("outcome") == JobState.SUCCEEDED.value
        await self._move(JobState.SUCCEEDED if ended else JobState.PAUSED)

    async def _check_start_deadline(self, error: Unavailable) -> None:
        if isinstance(error, Busy):
            # Its turn comes when another job ends, however long that takes.
            self._started = time.monotonic()
        starting = self._job.state in (JobState.QUEUED, JobState.STARTING)
        if starting and not self._applied and time.monotonic() - self._started > START_TIMEOUT_S:
            await self._fail(f"could not be started within {START_TIMEOUT_S:.0f} s: {error}")

    async def _store_events(self, block_ms: int) -> int:
        """Stores the next broker events and returns how many there were."""
        entries = await self._channel.read(self._job.cursor, READ_COUNT, block_ms)
        if not entries:
            return 0
        events = [(str(event.get("type")), event) for _, event in entries]
        kept = [
            (kind, {name: value for name, value in event.items() if name != "type"})
            for kind, event in events
            if kind in LEARNER_EVENTS
        ]
        self._job = await self._store.append(self._job, kept, cursor=entries[-1][0])
        return len(entries)

    async def _tell_processes(self, unit: UnitStatus | None) -> None:
        news: list[tuple[str, Body]] = []
        for process in unit.processes if unit else ():
            told = self._told.get(process.name)
            now = (process.state, process.restarts)
            if now == told or process.state not in _TOLD:
                continue
            self._told[process.name] = now
            if told is not None or self._tell_first:
                body: Body = {"name": process.name, "state": _TOLD[process.state], "restarts": process.restarts}
                news.append(("process", {**body, "exit_code": process.exit_code, "log": process.log_path}))
        if news:
            self._job = await self._store.append(self._job, news)
        if unit is not None:
            self._tell_first = True

    async def _advance(self, unit: UnitStatus | None) -> None:
        cancelling = self._job.state is JobState.CANCELLING
        if unit is None:
            # Never started, or not yet seen: only the first can be said to have ended.
            if cancelling and not self._applied:
                await self._move(JobState.CANCELLED)
        elif unit.state is UnitState.SUCCEEDED:
            await self._finish()
        elif unit.state is UnitState.FAILED:
            await self._move(JobState.CANCELLED if cancelling else JobState.FAILED, unit.message)
        elif self._job.state is JobState.STARTING and unit.ready:
            await self._move(JobState.RUNNING)
        if cancelling and self._overdue and not self._job.state.ended:
            await self._parts.launcher.remove(self._job.id, "cancelled, and not ended in time")
            await self._move(JobState.CANCELLED, f"stopped: not ended by itself within {CANCEL_GRACE_S:.0f} s")

    async def _finish(self) -> None:
        """The learner ended in order: what it said last is in the broker."""
        while await self._store_events(0):
            pass
        outcome = self._job.progress.get("outcome")
        late = self._job.state is JobState.CANCELLING and outcome != JobState.SUCCEEDED.value
        cancelled = late or outcome == JobState.CANCELLED.value
        await self._move(JobState.CANCELLED if cancelled else JobState.SUCCEEDED)

    async def _command_cancel(self) -> None:
        if self._cancelled_at is None:
            await self._channel.command("cancel")
            self._cancelled_at = time.monotonic()

    @property
    def _overdue(self) -> bool:
        return self._cancelled_at is not None and time.monotonic() - self._cancelled_at > CANCEL_GRACE_S

    async def _move(self, target: JobState, message: str = "") -> None:
        try:
            self._job = await self._store.move(self._job.id, target, message)
        except Conflict:
            # A cancel came in between; the next turn goes on from what the row says now.
            self._job = await self._store.get(self._job.id)
        else:
            log.info("job moved", job=self._job.id, state=target.value, message=message)

    async def _fail(self, message: str) -> None:
        self._job = await self._store.get(self._job.id)
        if not self._job.state.ended:
            cancelling = self._job.state is JobState.CANCELLING
            await self._move(JobState.CANCELLED if cancelling else JobState.FAILED, message)

    async def _clean_up(self) -> None:
        try:
            await self._parts.launcher.remove(self._job.id, f"the job is {self._job.state.value}")
            await self._parts.forget(self._job)
        except Unavailable as error:
            # The reconciler removes units without a job; the broker's leftovers take room and do no harm.
            log.warning("left behind", job=self._job.id, reason=str(error))
