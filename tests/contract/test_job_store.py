"""The job store over SQLite and over a real Postgres: moves, events, listings, idempotency, migrations."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from postgres import binaries, postgres
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import create_async_engine

from longshore.errors import ConfigError, Conflict, NotFound, Unavailable
from longshore.gateway import audit as audit_module
from longshore.gateway import store as store_module
from longshore.gateway import tables
from longshore.gateway.audit import AuditLog
from longshore.gateway.database import Database
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore, NewJob, wait_for_any


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    if binaries() is None:
        pytest.skip("no Postgres server on this machine: install Debian's `postgresql`")
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.db'}"
    server: str = request.getfixturevalue("postgres_server")
    name = f"t{uuid.uuid4().hex}"
    engine = create_async_engine(server, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.exec_driver_sql(f"CREATE DATABASE {name}")
    await engine.dispose()
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


async def queued(store: JobStore, job_id: str = "j-1", **more: object) -> Job:
    return await store.create(NewJob(job_id, **{"project": "default", "name": "j", "spec": {"name": "j"}, **more}))


async def told(store: JobStore, job_id: str = "j-1") -> list[tuple[str, dict[str, object]]]:
    return [(event.type, event.body) for event in await store.events(job_id, 0, 100_000)]


async def test_every_move_is_an_event(store: JobStore) -> None:
    await queued(store)
    for state in (JobState.STARTING, JobState.RUNNING, JobState.FAILED):
        job = await store.move("j-1", state, f"to {state.value}")
    assert job.state is JobState.FAILED
    assert job.error == "to failed"
    states = [(body["state"], body["message"]) for _, body in await told(store)]
    assert states == [("queued", ""), ("starting", "to starting"), ("running", "to running"), ("failed", "to failed")]


async def test_a_move_that_is_not_allowed_changes_nothing(store: JobStore) -> None:
    await queued(store)
    with pytest.raises(Conflict, match="is queued; it cannot become running"):
        await store.move("j-1", JobState.RUNNING)
    assert (await store.get("j-1")).state is JobState.QUEUED
    assert len(await told(store)) == 1


async def test_of_two_movers_one_wins(store: JobStore) -> None:
    await queued(store)
    await store.move("j-1", JobState.STARTING)
    moves = [store.move("j-1", state) for state in (JobState.SUCCEEDED, JobState.FAILED)]
    results = await asyncio.gather(*moves, return_exceptions=True)
    assert sorted(type(result) for result in results if isinstance(result, Conflict)) == [Conflict]
    assert len(await told(store)) == 3


async def test_unknown_and_taken_ids(store: JobStore) -> None:
    await queued(store)
    with pytest.raises(NotFound):
        await store.get("other")
    with pytest.raises(NotFound):
        await store.move("other", JobState.STARTING)
    with pytest.raises(Conflict):
        await queued(store)


async def test_events_and_cursor_are_stored_in_one_act(store: JobStore) -> None:
    job = await queued(store)
    job = await store.append(job, [("phase", {"phase": "train"})], cursor="17-0")
    assert (job.cursor, job.progress) == ("17-0", {"phase": "train"})
    # News of another origin leave the cursor where it is.
    job = await store.append(job, [("process", {"name": "a"})])
    assert job.cursor == "17-0"
    with pytest.raises(StatementError):
        await store.append(job, [("warning", {"message": object()})], cursor="18-0")
    assert (await store.get("j-1")).cursor == "17-0"
    assert [kind for kind, _ in await told(store)] == ["state", "phase", "process"]


async def test_old_events_are_dropped_type_by_type_and_moves_never(store: JobStore, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "MAX_EVENTS", 3)
    job = await queued(store)
    for state in (JobState.STARTING, JobState.RUNNING, JobState.CANCELLING):
        job = await store.move(job.id, state)
    job = await store.append(job, [("warning", {"message": "rare"})])
    for step in range(1, 6):
        job = await store.append(job, [("step", {"step": step, "steps": 5, "metrics": {}})])
    kept = await told(store)
    assert [body["step"] for kind, body in kept if kind == "step"] == [3, 4, 5]
    assert [kind for kind, _ in kept if kind != "step"] == ["state"] * 4 + ["warning"]


async def test_reopened_it_is_as_it_was(store: JobStore, url: str) -> None:
    await queued(store)
    await queued(store, "j-2")
    await store.move("j-1", JobState.FAILED, "x")
    again = Database(url)
    await again.open()
    assert [job.id for job in await JobStore(again).unfinished()] == ["j-2"]
    assert [job.id for job in await JobStore(again).newest(1)] == ["j-2"]
    await again.close()


async def test_listings_are_pages_of_one_order(store: JobStore) -> None:
    for number in range(7):
        await queued(store, f"j-{number}", project="ab"[number % 2])
    await store.move("j-4", JobState.STARTING)
    for project, state, wanted in [
        (None, None, [6, 5, 4, 3, 2, 1, 0]),
        ("a", None, [6, 4, 2, 0]),
        ("a", JobState.QUEUED, [6, 2, 0]),
        (None, JobState.STARTING, [4]),
        ("c", None, []),
    ]:
        found: list[Job] = []
        while page := await store.newest(2, project, state, (found[-1].created_at, found[-1].id) if found else None):
            found += page
        assert [job.id for job in found] == [f"j-{number}" for number in wanted]
        assert all(job.spec is None for job in found)


async def test_another_projects_job_is_not_there(store: JobStore) -> None:
    await queued(store, project="a")
    assert (await store.get("j-1", "a")).spec == {"name": "j"}
    with pytest.raises(NotFound) as hidden:
        await store.get("j-1", "b")
    with pytest.raises(NotFound) as absent:
        await store.get("j-2", "b")
    assert str(hidden.value).replace("j-1", "j-2") == str(absent.value)


async def test_of_one_idempotency_key_there_is_one_job(store: JobStore) -> None:
    wishes = [queued(store, f"j-{n}", idempotency_key="k", request_sha256=f"{n}") for n in range(8)]
    made = await asyncio.gather(*wishes, return_exceptions=True)
    (job,) = [item for item in made if isinstance(item, Job)]
    assert sum(isinstance(item, Conflict) for item in made) == 7
    found = await store.submitted("default", "k")
    assert found is not None
    assert (found[0], found[1]) == (job, job.id.removeprefix("j-"))
    # Another project's key is another key, and jobs without one do not meet.
    await queued(store, "other", project="b", idempotency_key="k")
    assert await store.submitted("c", "k") is None
    await queued(store, "x")
    await queued(store, "y")


async def test_every_change_counts_up_the_revision(store: JobStore) -> None:
    job = await queued(store)
    assert job.revision == 1
    job = await store.append(job, [("phase", {"phase": "train"})])
    assert job.revision == 2
    assert (await store.move(job.id, JobState.STARTING)).revision == 3


async def test_a_resumed_job_waits_anew(store: JobStore) -> None:
    job = await queued(store)
    for state in (JobState.PAUSING, JobState.PAUSED, JobState.QUEUED):
        moved = await store.move(job.id, state)
    assert moved.queued_at > job.queued_at
    assert moved.created_at == job.created_at


async def test_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    async with database.connected() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), tables.metadata)
        )
    assert differences == []


async def test_tables_made_before_there_were_migrations_are_brought_up_to_date(url: str) -> None:
    database = Database(url)
    old = sqlalchemy.MetaData()
    kept = ("id", "project", "name", "state", "spec", "error", "created_at", "updated_at", "progress", "cursor")
    jobs = sqlalchemy.Table("jobs", old, *[tables.jobs.c[name]._copy() for name in kept])
    sqlalchemy.Index("ix_jobs_state", jobs.c.state)
    tables.job_events.to_metadata(old)
    row = {"id": "j-1", "project": "default", "name": "j", "state": "running", "spec": {}, "progress": {"step": 3}}
    async with database.connected() as connection:
        await connection.run_sync(old.create_all)
        await connection.execute(jobs.insert().values(**row, error="", created_at=5.0, updated_at=6.0, cursor="7-0"))
    await database.open()
    job = await JobStore(database).get("j-1")
    assert (job.state, job.progress, job.cursor, job.queued_at) == (JobState.RUNNING, {"step": 3}, "7-0", 5.0)
    # And once more, as each start does.
    await database.open()
    await database.close()


async def test_gateways_that_start_together_migrate_once(url: str) -> None:
    databases = [Database(url) for _ in range(4)]
    await asyncio.gather(*[database.open() for database in databases])
    await queued(JobStore(databases[3]))
    for database in databases:
        await database.close()


async def test_a_newer_longshores_tables_are_left_alone(database: Database, url: str) -> None:
    async with database.connected() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    older = Database(url)
    with pytest.raises(ConfigError, match="revision 9999"):
        await older.open()
    await older.close()


async def test_a_database_that_is_away_is_unavailable() -> None:
    database = Database("postgresql+asyncpg://x@/x?host=/nowhere")
    with pytest.raises(Unavailable, match="cannot be used"):
        await database.open()


def test_a_url_of_nothing_is_refused() -> None:
    for wrong in ("nonsense", "postgresql+nothing://x/y"):
        with pytest.raises(ConfigError, match="LONGSHORE_DATABASE_URL"):
            Database(wrong)


async def test_a_change_wakes_whoever_took_the_event_before_it(store: JobStore) -> None:
    changed = store.changed()
    assert not changed.is_set()
    await queued(store)
    await wait_for_any(changed, timeout=0)
    assert changed.is_set()
    assert not store.changed().is_set()


async def test_the_audit_log_forgets_what_is_old_and_nothing_else(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_PRUNED_AT_ONCE", 2)
    audit = AuditLog(database)
    for age in range(7, 0, -1):
        monkeypatch.setattr(audit_module.time, "time", lambda age=age: 1000.0 - age)
        await audit.add("p", "root", "POST", f"/age/{age}", 200, "r")
    assert await audit.prune(before=1000.0 - 2) == 5
    assert [entry.path for entry in await audit.newest(10, "p", None)] == ["/age/1", "/age/2"]
    assert await audit.prune(before=1000.0 - 2) == 0
