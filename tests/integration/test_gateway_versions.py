"""What a job has learned, over REST: versions at a real weight store, forks, checkpoints, rollouts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from gateway_bench import GatewayBench
from redis.asyncio import Redis
from weight_origin import ASSETS, publish_versions, tensors_of, weight_origin

from longshore.errors import Unavailable
from longshore.gateway import driver, version_routes, versions
from longshore.gateway.prepare import job_paths, prepare
from longshore.launcher.plan import JobPaths
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import WeightsClient


@dataclass
class Learned:
    """A running job with versions 0 to 5, of which the store keeps three."""

    bench: GatewayBench
    http: httpx.AsyncClient
    file: JobFile
    key: SigningKey
    paths: JobPaths

    @property
    def path(self) -> str:
        return f"/v1/jobs/{self.file.job}"

    async def get(self, path: str, status: int = 200, **params: object) -> dict[str, object]:
        answer = await self.http.get(self.path + path, params=params)
        assert answer.status_code == status, answer.text
        body: dict[str, object] = answer.json()
        return body


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
async def learned(tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Learned]:
    monkeypatch.setattr(driver, "BLOCK_MS", 20)
    bench = GatewayBench(tmp_path, redis)
    async with weight_origin(tmp_path / "weights") as address:
        bench.weights = address
        await bench.start()
        job = await bench.store.get(await bench.running())
        paths = job_paths(tmp_path / "runs", tmp_path, job.id)
        file = prepare(job, paths)
        key = SigningKey.load(paths.signing_key_file)
        await publish_versions(address, file, key, 6)
        async with bench.http() as http:
            yield Learned(bench, http, file, key, paths)
        await bench.stop()


async def test_versions_are_listed_with_the_names_that_point_to_them(learned: Learned) -> None:
    page = await learned.get("/versions", limit=2)
    assert page == {"versions": [{"version": 5, "names": ["head"]}, {"version": 4, "names": []}], "next": 4}
    assert await learned.get("/versions", limit=2, before=4) == {
        "versions": [{"version": 3, "names": []}],
        "next": None,
    }
    version = await learned.get("/versions/4")
    assert (version["train_step"], version["names"]) == (40, [])
    for gone in (0, 99):
        await learned.get(f"/versions/{gone}", 404)
    await learned.get("/versions/-1", 422)


async def test_a_rollback_moves_the_signed_pointer(learned: Learned) -> None:
    for version in (4, 3, 5):
        answer = await learned.http.post(learned.path + "/rollback", json={"version": version})
        assert (answer.status_code, answer.json()["name"], answer.json()["version"]) == (200, "serving", version)
    # As any reader checks it, and with a serial that only grows.
    reader = WeightsClient(learned.bench.weights, learned.file.ref, learned.key.public_key)
    (serving,) = [state for state in await reader.pointers() if state.name == "serving"]
    await reader.close()
    assert (serving.version, serving.serial) == (5, answer.json()["serial"])
    assert (await learned.http.post(learned.path + "/rollback", json={"version": 0})).status_code == 404
    assert (await learned.http.post(learned.path + "/rollback", json={})).status_code == 422


async def test_a_pinned_version_is_kept(learned: Learned) -> None:
    pin = f"{learned.path}/versions/3/pin"
    assert (await learned.http.put(pin)).json()["name"] == "pin/v3"
    await publish_versions(learned.bench.weights, learned.file, learned.key, 9)
    found = (await learned.get("/versions"))["versions"]
    assert {"version": 3, "names": ["pin/v3"]} in found
    assert {"version": 4, "names": []} not in found
    assert (await learned.http.delete(pin)).status_code == 204
    assert (await learned.http.delete(f"{learned.path}/versions/8/pin")).status_code == 404


async def test_a_model_is_downloaded_as_one_safetensors_file(learned: Learned, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    answer = await learned.http.get(f"{learned.path}/versions/4/model")
    assert answer.status_code == 200
    ((name, tensor),) = safetensors.deserialize(answer.content)
    (expected,) = tensors_of(4)
    assert (name, bytes(tensor["data"]), tensor["shape"]) == ("w", expected.data, [4, 8])
    assert answer.headers["content-length"] == str(len(answer.content))


class SlowReader:
    """Whoever asked for a model, and reads it once they may."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()

    async def receive(self) -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def send(self, message: object) -> None:
        await self.may_read.wait()


async def test_models_that_nobody_reads_fill_no_memory(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_TURN_S", 0.02)
    runs = learned.paths.run_dir.parent
    held = versions.Versions(learned.bench.weights, lambda _: learned.paths)
    routes = version_routes.VersionRoutes(held, learned.bench._rotate, runs)
    job = await learned.bench.store.get(learned.file.job)
    scope = {"type": "http", "path": "/x", "asgi": {"spec_version": "2.4"}}
    reader = SlowReader()
    async with asyncio.timeout(20):
        sending = [
            asyncio.create_task((await routes.model(job, 4))(scope, reader.receive, reader.send)) for _ in range(2)
        ]
        with pytest.raises(Unavailable, match="memory"):
            await routes.model(job, 4)
        reader.may_read.set()
        await asyncio.gather(*sending)
        # One that is never read is given up.
        reader.may_read.clear()
        monkeypatch.setattr(version_routes, "_PATIENCE_S", 0.02)
        for _ in range(3):
            await (await routes.model(job, 4))(scope, reader.receive, reader.send)


async def test_a_fork_begins_with_a_version_and_changed_settings(learned: Learned) -> None:
    changes = {"name": "forked", "train": {"learning_rate": 1e-5}, "seed": None}
    headers = {"Idempotency-Key": "f"}
    bodies = [{"version": 4, "changes": changes}] * 2
    answers = [await learned.http.post(learned.path + "/fork", json=body, headers=headers) for body in bodies]
    assert [answer.status_code for answer in answers] == [201, 201]
    fork = answers[0].json()
    assert answers[1].json()["id"] == fork["id"]
    assert fork["id"].startswith("forked-")
    assert fork["parent"] == {"job": learned.file.job, "version": 4}
    spec = fork["spec"]
    assert (spec["train"]["learning_rate"], spec["train"]["steps"], spec["warm_start"]) == (1e-5, 3, None)
    folder = Path(spec["model"]["path"])
    assert folder == Path(fork["run_dir"]) / "parent"
    assert names_in(folder) == {*ASSETS, "model.safetensors"}
    (expected,) = tensors_of(4)
    assert (folder / "model.safetensors").read_bytes().endswith(expected.data)
    # The second request's folder is gone.
    assert names_in(learned.paths.run_dir.parent) == {learned.file.job, fork["id"]}
    other = await learned.http.post(learned.path + "/fork", json={"version": 5}, headers=headers)
    assert other.status_code == 409
    # Asked for again once the version has gone, it is still that fork.
    await publish_versions(learned.bench.weights, learned.file, learned.key, 9)
    await learned.get("/versions/4", 404)
    again = await learned.http.post(learned.path + "/fork", json=bodies[0], headers=headers)
    assert (again.status_code, again.json()["id"]) == (201, fork["id"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"version": 0}, 404),
        ({"changes": {"train": {"steps": 0}}}, 422),
        ({"changes": {"name": "../../x"}}, 422),
        ({"changes": {"name": 7}}, 422),
        ({"version": "4"}, 422),
    ],
)
async def test_a_fork_that_is_refused_leaves_nothing(learned: Learned, body: dict[str, object], status: int) -> None:
    answer = await learned.http.post(learned.path + "/fork", json=body)
    assert answer.status_code == status, answer.text
    assert names_in(learned.paths.run_dir.parent) == {learned.file.job}
    assert len(await learned.bench.store.newest(10)) == 1


async def test_a_fork_of_the_newest_needs_no_body(learned: Learned) -> None:
    answer = await learned.http.post(learned.path + "/fork")
    assert (answer.status_code, answer.json()["parent"]["version"]) == (201, 5)


async def test_checkpoints_are_listed_downloaded_and_pinned(learned: Learned) -> None:
    folder = learned.paths.run_dir / "learner" / "checkpoints" / "checkpoint_000001"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0123456789")
    (folder / "manifest.json").write_text(json.dumps({"step": 7, "sha256": {"model.safetensors": "ab"}}))
    path = f"{learned.path}/checkpoints/checkpoint_000001"
    assert (await learned.http.put(f"{path}/pin")).json()["pinned"] is True
    (found,) = (await learned.get("/checkpoints"))["checkpoints"]
    assert (found["name"], found["step"], found["pinned"]) == ("checkpoint_000001", 7, True)
    file = f"{path}/files/model.safetensors"
    assert (await learned.http.get(file, headers={"Range": "bytes=4-"})).content == b"456789"
    assert (await learned.http.get(f"{path}/files/none")).status_code == 404
    assert (await learned.http.delete(f"{path}/pin")).status_code == 204
    assert (await learned.http.put(f"{learned.path}/checkpoints/final/pin")).status_code == 409


async def test_a_job_that_was_never_started_has_nothing_yet(learned: Learned) -> None:
    job_id = await learned.bench.submit()
    path = f"/v1/jobs/{job_id}"
    assert (await learned.http.get(f"{path}/versions")).status_code == 404
    assert (await learned.http.post(f"{path}/rollback", json={"version": 0})).status_code == 409
    assert (await learned.http.post(f"{path}/fork")).status_code == 404
    assert (await learned.http.get(f"{path}/checkpoints")).json() == {"checkpoints": []}
    assert (await learned.http.get(f"{path}/metrics")).json() == {"names": [], "steps": [], "series": {}}


async def test_rollouts_are_where_they_are(learned: Learned, make_bench) -> None:
    queues = make_bench(learned.bench.redis, JobRef("default", learned.file.job))
    await queues.issued(6)
    lost, done, *_ = await queues.tickets.claim("actor-0", 3, 0)
    await queues.rollouts.deliver(done, b"not a rollout")
    await queues.tickets.reject(lost, "prompt_too_long", "x")
    (learned.paths.run_dir / "learner").mkdir(parents=True)
    record = {"step": 3, "epoch": 1, "groups": [7], "uses": [["7.1", 1], ["7.0", 1]], "late": []}
    batches = learned.paths.run_dir / "learner" / "batches.jsonl"
    batches.write_text(json.dumps(record, separators=(",", ":")) + "\n")

    page = await learned.get("/rollouts", limit=2)
    assert [view["id"] for view in page["rollouts"]] == ["0.1", "0.2"]
    rest = await learned.get("/rollouts", limit=9, after=page["next"])
    assert [view["id"] for view in rest["rollouts"]] == ["0.3", "1.0", "1.1"]
    assert rest["next"] is None
    running = await learned.get("/rollouts", state="running", site="home")
    assert [view["id"] for view in running["rollouts"]] == ["0.2"]
    assert [view["id"] for view in (await learned.get("/rollouts", step=3))["rollouts"]] == ["7.0", "7.1"]
    whole = await learned.get("/rollouts/0.1")
    assert (whole["state"], whole["bytes"], whole["content"]) == ("delivered", 13, None)
    assert (await learned.get("/rollouts/7.1"))["step"] == 3
    for key in ("0.0", "99.0", "x"):
        await learned.get(f"/rollouts/{key}", 404)
    sites = (await learned.get("/sites"))["sites"]
    assert [(site["name"], site["healthy"], site["tickets"]["delivered"]) for site in sites] == [("home", True, 1)]


async def test_a_job_is_answered_once_while_it_is_the_same(learned: Learned) -> None:
    first = await learned.http.get(learned.path)
    tag = first.headers["etag"]
    same = await learned.http.get(learned.path, headers={"If-None-Match": f'"x", {tag}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    await learned.http.post(learned.path + "/cancel")
    changed = await learned.http.get(learned.path, headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json()["state"]) == (200, "cancelling")
