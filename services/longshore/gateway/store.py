"""Jobs and their events in SQL. Every state move is checked against states.MOVES and is an event of its own.

Knows nothing of HTTP, of the broker or of processes. One transaction a call; nothing is cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Index, MetaData, String, Text, delete, event, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import Column, Table
from sqlalchemy.types import BigInteger, Integer

from longshore.errors import Conflict, NotFound, Unavailable
from longshore.gateway import metrics
from longshore.gateway.states import Body, JobState, progress_after, sources_of

# Of each type, state moves excepted; metrics.jsonl in the job's folder has every step.
MAX_EVENTS = 2000

_metadata = MetaData()
_jobs = Table(
    "jobs",
    _metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("spec", JSON, nullable=False),
    Column("error", Text, nullable=False, default=""),
    # Unix seconds.
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("progress", JSON, nullable=False),
    # Id of the newest broker event that was stored.
    Column("cursor", String(64), nullable=False),
)
_events = Table(
    "job_events",
    _metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("job", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("time", Float, nullable=False),
    Column("type", String(32), nullable=False),
    Column("body", JSON, nullable=False),
    Index("job_events_by_job", "job", "id"),
    Index("job_events_by_type", "job", "type", "id"),
    # Ids are never used twice, even after the newest were deleted: they are the stream's Last-Event-ID.
    sqlite_autoincrement=True,
)


@dataclass(frozen=True)
class Job:
    """One job as it is stored; times in Unix seconds."""

    id: str
    project: str
    name: str
    state: JobState
    spec: Body
    error: str
    created_at: float
    updated_at: float
    progress: Body
    cursor: str


@dataclass(frozen=True)
class Event:
    """One thing that happened in a job. Example: Event(17, 1733000000.0, "phase", {"phase": "train"})"""

    id: int
    time: float
    type: str
    body: Body


class JobStore:
    """The job database. Open it before use, close it after. Every method raises Unavailable while it cannot be used."""

    def __init__(self, url: str) -> None:
        self._engine: AsyncEngine = create_async_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Makes the tables that are missing."""
        async with self._engine.begin() as connection:
            await connection.run_sync(_metadata.create_all)

    async def close(self) -> None:
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """One transaction. Raises Unavailable while the database cannot be used: its disk is full, it is away."""
        try:
            async with self._engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise Unavailable(f"the job database cannot be used: {error.orig}") from None

    async def create(self, job_id: str, project: str, name: str, spec: Body) -> Job:
        """Stores a queued job. Raises Conflict when the id is taken."""
        now = time.time()
        row = {"id": job_id, "project": project, "name": name, "state": JobState.QUEUED.value, "spec": spec}
        times = {"created_at": now, "updated_at": now}
        try:
            async with self._connected() as connection:
                await connection.execute(insert(_jobs).values(**row, **times, error="", progress={}, cursor="0"))
                await _add_state_event(connection, job_id, JobState.QUEUED, "", now)
        except IntegrityError:
            raise Conflict(f"there is a job {job_id} already") from None
        self._notify()
        return await self.get(job_id)

    async def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        async with self._connected() as connection:
            row = (await connection.execute(select(_jobs).where(_jobs.c.id == job_id))).mappings().first()
        if row is None:
            raise NotFound(f"there is no job {job_id}")
        return _job(row)

    async def newest(self, limit: int) -> list[Job]:
        """The newest jobs, newest first."""
        query = select(_jobs).order_by(_jobs.c.created_at.desc(), _jobs.c.id).limit(limit)
        async with self._connected() as connection:
            return [_job(row) for row in (await connection.execute(query)).mappings()]

    async def unfinished(self) -> list[Job]:
        """Every job that has not ended, oldest first."""
        states = [state.value for state in JobState if not state.ended]
        query = select(_jobs).where(_jobs.c.state.in_(states)).order_by(_jobs.c.created_at)
        async with self._connected() as connection:
            return [_job(row) for row in (await connection.execute(query)).mappings()]

    async def move(self, job_id: str, target: JobState, message: str = "") -> Job:
        """Moves a job to a state and says so in an event.

        Raises:
            NotFound: there is no such job.
            Conflict: its present state does not allow the move.
        """
        now = time.time()
        sources = [state.value for state in sources_of(target)]
        values: dict[str, object] = {"state": target.value, "updated_at": now}
        if target is JobState.FAILED:
            values["error"] = message
        async with self._connected() as connection:
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
        cursor = job.cursor if cursor is None else cursor
        async with self._connected() as connection:
            await connection.execute(
                update(_jobs).where(_jobs.c.id == job.id).values(progress=progress, cursor=cursor, updated_at=now)
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
        async with self._connected() as connection:
            rows = (await connection.execute(query.limit(limit))).mappings()
            return [Event(row["id"], row["time"], row["type"], row["body"]) for row in rows]

    def changed(self) -> asyncio.Event:
        """An event that is set at the next change of any job; take it before reading, wait for it after."""
        return self._changed

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def wait_for_any(*events: asyncio.Event, timeout: float | None) -> None:
    """Waits until one of the events is set, or for `timeout` seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _prepare_sqlite(connection: Any, record: object) -> None:
    with contextlib.closing(connection.cursor()) as cursor:
        # Readers go on while one writes; a second writer waits.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA busy_timeout=10000")
        cursor.execute("PRAGMA foreign_keys=ON")


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
