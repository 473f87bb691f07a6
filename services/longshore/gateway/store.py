"""Jobs and their events in SQL. Every state move is checked against states.MOVES and is an event of its own.

Knows nothing of HTTP, of the broker or of processes. One transaction a call; nothing is cached.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from longshore.errors import Conflict, NotFound
from longshore.gateway import metrics, tables
from longshore.gateway.database import Database
from longshore.gateway.states import Body, JobState, progress_after, sources_of

# Of each type, state moves excepted; metrics.jsonl in the job's folder has every step.
MAX_EVENTS = 2000

_jobs, _events = tables.jobs, tables.job_events
# What a listing shows: everything but the spec, which is most of a row.
_LISTED = [column for column in _jobs.c if column.name not in ("spec", "request_sha256")]
_WHOLE = [column for column in _jobs.c if column.name != "request_sha256"]


@dataclass(frozen=True)
class Job:
    """One job as it is stored; times in Unix seconds. `spec` is None in listings."""

    id: str
    project: str
    name: str
    state: JobState
    error: str
    created_at: float
    updated_at: float
    progress: Body
    cursor: str
    revision: int
    queued_at: float
    generators: int
    gpus: int
    parent_job: str | None
    parent_version: int | None
    idempotency_key: str | None
    spec: Body | None = None


@dataclass(frozen=True)
class NewJob:
    """What is told of a job when it is queued; see `tables.jobs`."""

    id: str
    project: str
    name: str
    spec: Body
    generators: int = 1
    gpus: int = 0
    parent_job: str | None = None
    parent_version: int | None = None
    idempotency_key: str | None = None
    request_sha256: str | None = None


@dataclass(frozen=True)
class Event:
    """One thing that happened in a job. Example: Event(17, 1733000000.0, "phase", {"phase": "train"})"""

    id: int
    time: float
    type: str
    body: Body


class JobStore:
    """The jobs of one database. Every method raises Unavailable while the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changed = asyncio.Event()

    async def create(self, new: NewJob) -> Job:
        """Stores a queued job. Raises Conflict: its id, or its idempotency key in its project, is taken."""
        now = time.time()
        row = {**vars(new), "state": JobState.QUEUED.value, "created_at": now, "updated_at": now, "queued_at": now}
        try:
            async with self._database.connected() as connection:
                await connection.execute(insert(_jobs).values(**row, error="", progress={}, cursor="0"))
                await _add_state_event(connection, new.id, JobState.QUEUED, "", now)
        except IntegrityError:
            raise Conflict(f"there is a job {new.id} already, or one of the same idempotency key") from None
        self._notify()
        return await self.get(new.id)

    async def submitted(self, project: str, idempotency_key: str) -> tuple[Job, str | None] | None:
        """The job that was submitted under a key, and the SHA-256 of what was sent; None while there is none."""
        query = select(*_WHOLE, _jobs.c.request_sha256).where(
            _jobs.c.project == project, _jobs.c.idempotency_key == idempotency_key
        )
        row = next(iter(await self._database.rows(query)), None)
        if row is None:
            return None
        return _job({name: value for name, value in row.items() if name != "request_sha256"}), row["request_sha256"]

    async def get(self, job_id: str, project: str | None = None) -> Job:
        """A job, with `project` only if it is that project's. Raises NotFound."""
        query = select(*_WHOLE).where(_jobs.c.id == job_id)
        if project is not None:
            query = query.where(_jobs.c.project == project)
        row = next(iter(await self._database.rows(query)), None)
        if row is None:
            # The same words for a job that is another project's: nobody is told that it is there.
            raise NotFound(f"there is no job {job_id}")
        return _job(row)

    async def newest(
        self,
        limit: int,
        project: str | None = None,
        state: JobState | None = None,
        before: tuple[float, str] | None = None,
    ) -> list[Job]:
        """Jobs, newest first, without their specs.

        Args:
            project: only this project's.
            state: only those in this state.
            before: (created_at, id) of the last job of the page before.
        """
        query: Select[Any] = select(*_LISTED).order_by(_jobs.c.created_at.desc(), _jobs.c.id.desc()).limit(limit)
        if project is not None:
            query = query.where(_jobs.c.project == project)
        if state is not None:
            query = query.where(_jobs.c.state == state.value)
        if before is not None:
            query = query.where(tuple_(_jobs.c.created_at, _jobs.c.id) < before)
        return await self._listed(query)

    async def unfinished(self) -> list[Job]:
        """Every job that has not ended, oldest first, without specs."""
        states = [state.value for state in JobState if not state.ended]
        return await self._listed(select(*_LISTED).where(_jobs.c.state.in_(states)).order_by(_jobs.c.created_at))

    async def count_unfinished(self, project: str) -> int:
        """A project's jobs that have not ended."""
        states = [state.value for state in JobState if not state.ended]
        counted = func.count().label("number")
        query = select(counted).select_from(_jobs).where(_jobs.c.project == project, _jobs.c.state.in_(states))
        return int((await self._database.rows(query))[0]["number"])

    async def move(self, job_id: str, target: JobState, message: str = "") -> Job:
        """Moves a job to a state and says so in an event.

        Raises:
            NotFound: there is no such job.
            Conflict: its present state does not allow the move.
        """
        now = time.time()
        sources = [state.value for state in sources_of(target)]
        values: dict[str, object] = {"state": target.value, "updated_at": now, "revision": _jobs.c.revision + 1}
        if target is JobState.FAILED:
            values["error"] = message
        if target is JobState.QUEUED:
            values["queued_at"] = now
        async with self._database.connected() as connection:
            # The write comes first, and tests the state itself: two writers cannot both pass.
            moved = await connection.execute(
                update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state.in_(sources)).values(**values)
            )
            if moved.rowcount:
                await _add_state_event(connection, job_id, target, message, now)
        job = await self.get(job_id)
        if not moved.rowcount:
            raise Conflict(f"job {job_id} is {job.state.value}; it cannot become {target.value}")
        metrics.MOVES.labels(target.value).inc()
        self._notify()
        return job

    async def append(self, job: Job, events: Sequence[tuple[str, Body]], cursor: str | None = None) -> Job:
        """Stores events, and in the same act how far the broker's stream has been read. Returns the job after it."""
        now = time.time()
        progress = job.progress
        for kind, body in events:
            progress = progress_after(progress, kind, body)
        values = {"progress": progress, "cursor": job.cursor if cursor is None else cursor, "updated_at": now}
        async with self._database.connected() as connection:
            await connection.execute(
                update(_jobs).where(_jobs.c.id == job.id).values(**values, revision=_jobs.c.revision + 1)
            )
            if events:
                rows = [{"job": job.id, "time": now, "type": kind, "body": body} for kind, body in events]
                await connection.execute(insert(_events), rows)
            for kind in {kind for kind, _ in events}:
                await _prune(connection, job.id, kind)
        for kind, _ in events:
            metrics.EVENTS.labels(kind).inc()
        self._notify()
        return await self.get(job.id)

    async def events(self, job_id: str, after: int, limit: int) -> list[Event]:
        """Events of a job after an event id, oldest first."""
        query = select(_events).where(_events.c.job == job_id, _events.c.id > after).order_by(_events.c.id)
        rows = await self._database.rows(query.limit(limit))
        return [Event(row["id"], row["time"], row["type"], row["body"]) for row in rows]

    def changed(self) -> asyncio.Event:
        """An event that is set at the next change of any job; take it before reading, wait for it after."""
        return self._changed

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _listed(self, query: Select[Any]) -> list[Job]:
        return [_job(row) for row in await self._database.rows(query)]


async def wait_for_any(*events: asyncio.Event, timeout: float | None) -> None:
    """Waits until one of the events is set, or for `timeout` seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _add_state_event(connection: AsyncConnection, job_id: str, state: JobState, message: str, now: float) -> None:
    body = {"state": state.value, "message": message}
    await connection.execute(insert(_events).values(job=job_id, time=now, type="state", body=body))


async def _prune(connection: AsyncConnection, job_id: str, kind: str) -> None:
    same = (_events.c.job == job_id, _events.c.type == kind)
    newest_dropped = select(_events.c.id).where(*same).order_by(_events.c.id.desc()).offset(MAX_EVENTS).limit(1)
    last = (await connection.execute(newest_dropped)).scalar()
    if last is not None:
        await connection.execute(delete(_events).where(*same, _events.c.id <= last))


def _job(row: Any) -> Job:
    return Job(**{**row, "state": JobState(row["state"])})
