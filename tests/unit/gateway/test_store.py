from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.exc import StatementError

from longshore.errors import Conflict, NotFound
from longshore.gateway import store as store_module
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore, wait_for_any


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    store = JobStore(f"sqlite+aiosqlite:///{tmp_path / 'jobs.db'}")
    await store.open()
    yield store
    await store.close()


async def queued(store: JobStore, job_id: str = "j-1") -> Job:
    return await store.create(job_id, "default", "j", {"name": "j"})


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


async def test_reopened_it_is_as_it_was(store: JobStore, tmp_path: Path) -> None:
    await queued(store)
    await queued(store, "j-2")
    await store.move("j-1", JobState.FAILED, "x")
    again = JobStore(f"sqlite+aiosqlite:///{tmp_path / 'jobs.db'}")
    await again.open()
    assert [job.id for job in await again.unfinished()] == ["j-2"]
    assert [job.id for job in await again.newest(1)] == ["j-2"]
    await again.close()


async def test_a_change_wakes_whoever_took_the_event_before_it(store: JobStore) -> None:
    changed = store.changed()
    assert not changed.is_set()
    await queued(store)
    await wait_for_any(changed, timeout=0)
    assert changed.is_set()
    assert not store.changed().is_set()
