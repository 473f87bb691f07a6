"""Steering jobs over REST: pause and resume, idempotency, places and quotas, and a gateway that dies at any move."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from gateway_bench import GatewayBench, all_events, document

from longshore.gateway import database
from longshore.gateway.places import Limits
from longshore.gateway.states import JobState
from longshore.gateway.store import Job, JobStore
from longshore.launcher.spec import ProcessState, UnitState


async def post(bench: GatewayBench, path: str, status: int = 200, **more: object) -> dict[str, object]:
    async with bench.http() as http:
        answer = await http.post(f"/v1/jobs{path}", **more)
    assert answer.status_code == status, answer.text
    body: dict[str, object] = answer.json()
    return body


async def states_told(bench: GatewayBench, job_id: str) -> list[object]:
    return [event["state"] for event in await all_events(bench, job_id) if event["type"] == "state"]


async def test_a_paused_job_gives_its_place_away_and_goes_on_later(bench: GatewayBench) -> None:
    job_id = await bench.running()
    assert (await post(bench, f"/{job_id}/pause"))["state"] == "pausing"
    await bench.until_state(job_id, "paused")
    assert bench.launcher.removed == [job_id]
    # Nothing of it is forgotten, and nothing starts it by itself.
    await bench.channel(job_id).publish({"type": "warning", "message": "kept"})
    assert (await post(bench, f"/{job_id}/pause"))["state"] == "paused"
    assert bench.launcher.applied == [job_id]
    assert (await post(bench, f"/{job_id}/resume"))["state"] == "queued"
    await bench.until_state(job_id, "starting")
    bench.launcher.process(job_id, ProcessState.READY)
    await bench.until_state(job_id, "running")
    assert (await post(bench, f"/{job_id}/resume"))["state"] == "running"
    await bench.channel(job_id).publish({"type": "summary", "summary": {"state": "succeeded"}})
    bench.launcher.becomes(job_id, UnitState.SUCCEEDED)
    await bench.until_state(job_id, "succeeded")
    assert await states_told(bench, job_id) == [
        *("queued", "starting", "running", "pausing", "paused"),
        *("queued", "starting", "running", "succeeded"),
    ]
    for act in ("pause", "resume"):
        await post(bench, f"/{job_id}/{act}", 409)


async def test_a_paused_job_can_be_cancelled(bench: GatewayBench) -> None:
    job_id = await bench.running()
    await post(bench, f"/{job_id}/pause")
    await bench.until_state(job_id, "paused")
    await post(bench, f"/{job_id}/cancel")
    await bench.until_state(job_id, "cancelled")
    assert bench.launcher.applied == [job_id]


async def test_a_pause_that_came_too_late_is_a_success(bench: GatewayBench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await bench.running()
    remove = bench.launcher.remove

    async def ends_meanwhile(unit: str, reason: str) -> None:
        await bench.channel(job_id).publish({"type": "summary", "summary": {"state": "succeeded"}})
        await remove(unit, reason)

    monkeypatch.setattr(bench.launcher, "remove", ends_meanwhile)
    await post(bench, f"/{job_id}/pause")
    await bench.until_state(job_id, "succeeded")


async def test_of_200_submissions_with_duplicates_each_key_has_one_job(
    bench: GatewayBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the disk is: 160 commits that are synced.
    monkeypatch.setattr(database, "_WAIT_S", 280.0)
    bench.room = Limits(jobs=1)
    spec = document()
    keys = [f"key-{number}" for number in range(160)] + [f"key-{number}" for number in range(40)]

    async def submit(key: str) -> tuple[str, str]:
        body = {**spec, "seed": int(key[4:])}
        answer = await http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code == 201, answer.text
        return key, answer.json()["id"]

    async with bench.http() as http:
        # More than the client has connections: the last ones wait long.
        http.timeout = httpx.Timeout(280.0)
        made = await asyncio.gather(*[submit(key) for key in keys])
        # The same words once more.
        assert (await submit("key-7")) in made
    assert len({job for _, job in made}) == 160
    assert len(set(made)) == 160
    assert len(await bench.store.newest(1000)) == 160
    problem = await post(bench, "", 409, json={**spec, "seed": 99}, headers={"Idempotency-Key": "key-7"})
    assert dict(made)["key-7"] in str(problem["detail"])
    await post(bench, "", 422, json=spec, headers={"Idempotency-Key": "no spaces"})


async def test_jobs_wait_for_their_projects_quota(bench: GatewayBench) -> None:
    async with bench.http() as http:
        answer = await http.put("/v1/projects/small", json={"max_jobs": 1, "max_gpus": 0})
        assert answer.status_code == 200
    first = await post(bench, "", 201, json=document(project="small"))
    await bench.until_state(str(first["id"]), "starting")
    second = await post(bench, "", 201, json=document(project="small"))
    other = await post(bench, "", 201, json=document(project="other"))
    await bench.until_state(str(other["id"]), "starting")
    assert (await bench.store.get(str(second["id"]))).state is JobState.QUEUED
    async with bench.http() as http:
        (_, small) = (await http.get("/v1/projects")).json()["projects"]
    assert (small["name"], small["jobs"], small["queued"], small["max_jobs"]) == ("small", 1, 1, 1)
    # A pause makes room; a job that waits can be cancelled.
    await post(bench, f"/{first['id']}/pause")
    await bench.until_state(str(second["id"]), "starting")
    await post(bench, f"/{first['id']}/resume")
    await post(bench, f"/{first['id']}/cancel")
    await bench.until_state(str(first["id"]), "cancelled")
    # What could never start is refused at once.
    train = {"steps": 1, "compute": {"device": "cuda"}}
    problem = await post(bench, "", 422, json=document(project="small", train=train))
    assert "1 gpus, and at most 0 are allowed to project small" in str(problem)


@pytest.mark.parametrize("before", [True, False], ids=["before the write", "after it"])
@pytest.mark.parametrize("target", [state for state in JobState if state not in (JobState.FAILED, JobState.PAUSED)])
async def test_a_gateway_that_dies_at_a_move_leaves_no_job_stuck(
    bench: GatewayBench, monkeypatch: pytest.MonkeyPatch, target: JobState, before: bool
) -> None:
    """One job that is paused, resumed, and ends or is cancelled; the gateway dies once, at its move to `target`."""
    died = asyncio.Event()
    move = JobStore.move

    async def deadly(self: JobStore, job_id: str, to: JobState, message: str = "") -> Job:
        if to is not target or died.is_set():
            return await move(self, job_id, to, message)
        if not before:
            await move(self, job_id, to, message)
        died.set()
        # As after SIGKILL: nothing that was to follow is done.
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(JobStore, "move", deadly)
    ending = "cancelled" if target in (JobState.CANCELLING, JobState.CANCELLED) else "succeeded"
    living = asyncio.create_task(live(bench, ending))
    await asyncio.wait_for(died.wait(), 20)
    await bench.kill()
    await bench.start()
    await living


async def live(bench: GatewayBench, ending: str) -> None:
    """Sees a job through; whatever a dead gateway did not answer is asked again."""
    job_id = await persist(bench, "", json=document(), headers={"Idempotency-Key": "one"})
    await towards(bench, job_id, JobState.RUNNING)
    await persist(bench, f"/{job_id}/pause")
    await bench.until_state(job_id, "paused")
    await persist(bench, f"/{job_id}/resume")
    await towards(bench, job_id, JobState.RUNNING)
    if ending == "cancelled":
        await persist(bench, f"/{job_id}/cancel")
    await bench.channel(job_id).publish({"type": "summary", "summary": {"state": ending}})
    bench.launcher.becomes(job_id, UnitState.SUCCEEDED)
    await bench.until_state(job_id, ending)
    moves = [event.body["state"] for event in await bench.store.events(job_id, 0, 1000) if event.type == "state"]
    assert moves.count("paused") == 1
    assert moves[-1] == ending


async def towards(bench: GatewayBench, job_id: str, state: JobState) -> None:
    async def reached() -> bool:
        if job_id in bench.launcher.units:
            bench.launcher.process(job_id, ProcessState.READY)
        return (await bench.store.get(job_id)).state is state

    await bench.until(reached)


async def persist(bench: GatewayBench, path: str, **more: object) -> str:
    """Asks until it is answered."""
    answers: list[str] = []

    async def answered() -> bool:
        try:
            async with bench.http() as http:
                answer = await http.post(f"/v1/jobs{path}", timeout=2.0, **more)
        except httpx.HTTPError:
            return False
        if answer.is_success:
            answers.append(answer.json()["id"])
        return answer.is_success

    await bench.until(answered)
    return answers[0]
