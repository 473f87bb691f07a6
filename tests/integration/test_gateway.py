"""A job's life in a gateway, from queued to its end, with restarts of everything around it."""

from __future__ import annotations

import asyncio

import pytest
from gateway_bench import KEY, PROCESSES, FakeLauncher, GatewayBench, all_events, document
from sqlalchemy import Connection, event

from longshore.client import ApiClient
from longshore.errors import Conflict, Unavailable
from longshore.gateway import driver
from longshore.gateway.database import Database
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore
from longshore.launcher.spec import ProcessState, UnitState, UnitStatus


async def test_a_job_runs_to_success(bench: GatewayBench) -> None:
    job_id = await bench.running()
    channel = bench.channel(job_id)
    await channel.publish({"type": "phase", "phase": "train", "detail": ""})
    await channel.publish({"type": "step", "step": 1, "steps": 1, "metrics": {"reward/mean": 0.5}})
    await channel.publish({"type": "state", "state": "failed", "message": "not the learner's to say"})
    await channel.publish({"type": "summary", "summary": {"state": "succeeded"}})
    bench.launcher.becomes(job_id, UnitState.SUCCEEDED)
    events = await all_events(bench, job_id)
    told = [(event["type"], event.get("state") or event.get("phase")) for event in events]
    assert [state for kind, state in told if kind == "state"] == ["queued", "starting", "running", "succeeded"]
    assert [kind for kind, _ in told if kind not in ("state", "process")] == ["phase", "step", "summary"]
    assert told[-1] == ("state", "succeeded")
    ready = [event["name"] for event in events if event["type"] == "process"]
    assert sorted(ready) == sorted(PROCESSES)
    assert (await bench.store.get(job_id)).progress["reward/mean"] == 0.5

    async def cleaned() -> bool:
        return job_id in bench.launcher.removed and not await channel.read("0", 10, 0)

    await bench.until(cleaned)


async def test_a_failed_unit_fails_the_job_with_its_message(bench: GatewayBench) -> None:
    job_id = await bench.running()
    bench.launcher.becomes(job_id, UnitState.FAILED, "learner died 3 times; its log: /x.log")
    job = await bench.until_state(job_id, "failed")
    assert job.error == "learner died 3 times; its log: /x.log"
    assert (await all_events(bench, job_id))[-1]["message"] == job.error


async def test_restarts_are_told(bench: GatewayBench) -> None:
    job_id = await bench.running()
    bench.launcher.process(job_id, ProcessState.BACKOFF, exit_code=-9)

    async def told(state: str) -> bool:
        events = [event.body for event in await bench.store.events(job_id, 0, 100) if event.type == "process"]
        return sum(body["state"] == state and body["exit_code"] == -9 for body in events) == len(PROCESSES)

    await bench.until(lambda: told("restarting"))
    bench.launcher.process(job_id, ProcessState.READY, restarts=1)
    await bench.until(lambda: told("ready"))


async def test_a_job_that_cannot_be_applied_fails(bench: GatewayBench) -> None:
    bench.launcher.refuses = Conflict("unit is there with other processes")
    job_id = await bench.submit()
    assert (await bench.until_state(job_id, "failed")).error == "unit is there with other processes"


async def test_an_absent_launcher_is_waited_for(bench: GatewayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "RETRY_S", 0.02)
    bench.launcher.refuses = Unavailable("away")
    job_id = await bench.submit()

    async def tried() -> bool:
        return bench.prepared.count(job_id) >= 2

    await bench.until(tried)
    assert (await bench.store.get(job_id)).state is JobState.QUEUED
    bench.launcher.refuses = None
    await bench.until_state(job_id, "starting")


async def test_what_waits_too_long_to_start_fails(bench: GatewayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "START_TIMEOUT_S", 0.0)
    bench.launcher.refuses = Unavailable("away")
    job_id = await bench.submit()
    assert "could not be started" in (await bench.until_state(job_id, "failed")).error


async def test_a_full_disk_under_the_database_is_waited_for(
    bench: GatewayBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "RETRY_S", 0.05)
    job_id = await bench.running()
    most_pages = 1

    @event.listens_for(bench.database._engine.sync_engine, "begin")
    def limit(connection: Connection) -> None:
        # SQLite says of a database that may not grow what it says of one whose disk is full.
        connection.exec_driver_sql(f"PRAGMA max_page_count={most_pages}")

    message = "x" * 100_000
    await bench.channel(job_id).publish({"type": "warning", "message": message})
    async with bench.http() as http:
        large = document(tasks={"source": "jsonl", "options": {"much": message}})
        answer = await http.post("/v1/jobs", json=large)
        assert (answer.status_code, "disk is full" in answer.text) == (503, True)
        assert (await http.get(f"/v1/jobs/{job_id}")).json()["state"] == "running"
    most_pages = 2**30
    bench.launcher.becomes(job_id, UnitState.FAILED, "at last")
    assert (await bench.until_state(job_id, "failed")).error == "at last"
    told = await all_events(bench, job_id)
    assert [body["message"] for body in told if body["type"] == "warning"] == [message]


async def test_cancel_asks_the_learner_and_believes_its_end(bench: GatewayBench) -> None:
    job_id = await bench.running()
    async with ApiClient(bench.url, KEY) as client:
        assert (await client.cancel(job_id))["state"] == "cancelling"

        async def asked() -> bool:
            return await bench.channel(job_id).pending_command() == "cancel"

        await bench.until(asked)
        assert job_id not in bench.launcher.removed
        await bench.channel(job_id).publish({"type": "summary", "summary": {"state": "cancelled"}})
        bench.launcher.becomes(job_id, UnitState.SUCCEEDED)
        await bench.until_state(job_id, "cancelled")
        # Cancelling what is cancelled is harmless.
        assert (await client.cancel(job_id))["state"] == "cancelled"


async def test_a_learner_that_does_not_end_is_stopped(bench: GatewayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "CANCEL_GRACE_S", 0.1)
    job_id = await bench.running()
    async with ApiClient(bench.url, KEY) as client:
        await client.cancel(job_id)
    await bench.until_state(job_id, "cancelled")
    assert job_id in bench.launcher.removed


async def test_a_cancel_that_came_too_late_is_a_success(bench: GatewayBench) -> None:
    job_id = await bench.running()
    async with ApiClient(bench.url, KEY) as client:
        await client.cancel(job_id)
        await bench.channel(job_id).publish({"type": "summary", "summary": {"state": "succeeded"}})
        bench.launcher.becomes(job_id, UnitState.SUCCEEDED)
        await bench.until_state(job_id, "succeeded")
        with pytest.raises(Conflict, match="is succeeded"):
            await client.cancel(job_id)


async def test_a_restarted_gateway_goes_on_where_it_was(bench: GatewayBench) -> None:
    job_id = await bench.running()
    channel = bench.channel(job_id)
    await channel.publish({"type": "warning", "message": "one"})

    async def stored() -> bool:
        return any(event.type == "warning" for event in await bench.store.events(job_id, 0, 100))

    await bench.until(stored)
    watching = asyncio.create_task(all_events(bench, job_id))
    await bench.stop()
    await channel.publish({"type": "warning", "message": "two"})
    await bench.start()
    await channel.publish({"type": "summary", "summary": {"state": "succeeded"}})
    bench.launcher.becomes(job_id, UnitState.SUCCEEDED)
    # A watcher lives through the restart, and sees each event once.
    events = await watching
    assert [event["message"] for event in events if event["type"] == "warning"] == ["one", "two"]
    assert [event["state"] for event in events if event["type"] == "state"][-1] == "succeeded"
    assert len([event for event in events if event["type"] == "process"]) == len(PROCESSES)
    # Applied again, because the launcher may be new as well.
    assert bench.launcher.applied == [job_id, job_id]


async def test_a_cancel_survives_a_new_launcher(bench: GatewayBench) -> None:
    job_id = await bench.running()
    await bench.store.move(job_id, JobState.CANCELLING)
    await bench.stop()
    bench.launcher = FakeLauncher()
    await bench.start()
    await bench.until_state(job_id, "cancelled")
    assert bench.launcher.applied == []


async def test_a_unit_whose_job_has_ended_is_removed(bench: GatewayBench) -> None:
    bench.launcher.set(UnitStatus("stray-1", UnitState.RUNNING))
    bench.launcher.set(UnitStatus("stack", UnitState.RUNNING))

    async def removed() -> bool:
        return bench.launcher.removed == ["stray-1"]

    await bench.until(removed)


async def test_jobs_of_an_earlier_stack_can_be_left_alone(bench: GatewayBench) -> None:
    old = await bench.running()
    await bench.stop()
    bench.launcher = FakeLauncher()
    bench.jobs_since = (await old_job(bench, old)).created_at + 0.001
    await bench.start()
    new = await bench.submit()
    await bench.until_state(new, "starting")
    assert bench.launcher.applied == [new]


async def old_job(bench: GatewayBench, job_id: str) -> Job:
    database = Database(f"sqlite+aiosqlite:///{bench.folder / 'jobs.db'}")
    job = await JobStore(database).get(job_id)
    await database.close()
    return job
