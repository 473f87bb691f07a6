"""Tenants: keys, roles, projects. Each test over "every route" takes them from the OpenAPI document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import prometheus_client
import pytest
from gateway_bench import KEY, GatewayBench, document
from redis.asyncio import Redis

from longshore.gateway import auth, driver
from longshore.gateway.rate_limit import Rate

MARK = "only-of-project-a"
# What stands for a path's parameters; a route with another one must be added here.
PARAMETERS = {"letter_id": "1-0", "rollout_id": "0.0", "version": "0", "name": "checkpoint_000001", "file": "x"} | {
    "site": "west"
}


@dataclass
class Tenants:
    """Two projects, a and b, with keys of each role, and a job of a."""

    bench: GatewayBench
    keys: dict[str, str]
    key_ids: dict[str, str]
    job_id: str
    operations: list[tuple[str, str]]

    def http(self, who: str) -> httpx.AsyncClient:
        return self.bench.http(self.keys[who])

    def path(self, template: str, job_id: str, key_id: str) -> str:
        values = {**PARAMETERS, "job_id": job_id, "key_id": key_id, "project": "a"}
        return template.format(**values)


@pytest.fixture
async def tenants(tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tenants]:
    monkeypatch.setattr(driver, "BLOCK_MS", 20)
    bench = GatewayBench(tmp_path, redis)
    await bench.start()
    keys, key_ids = {"root": KEY}, {}
    async with bench.http() as http:
        for project in "ab":
            for role in ("viewer", "submitter", "admin"):
                body = {"project": project, "role": role, "name": MARK if project == "a" else "other"}
                made = (await http.post("/v1/keys", json=body)).json()
                keys[f"{project}-{role}"], key_ids[f"{project}-{role}"] = made["key"], made["id"]
        spec = (await http.get("/openapi.json")).json()
        answer = await http.post("/v1/jobs", json=document(name=MARK, project="a"))
        await http.put("/v1/projects/a", json={"max_jobs": 7})
    operations = [
        (method.upper(), path) for path, item in spec["paths"].items() if path != "/healthz" for method in item
    ]
    yield Tenants(bench, keys, key_ids, answer.json()["id"], operations)
    await bench.stop()


async def test_no_route_tells_another_project_anything(tenants: Tenants) -> None:
    """The job of a is to b what a job is that was never there; no list of b has anything of a."""
    tried = 0
    async with tenants.http("b-admin") as http:
        for method, template in tenants.operations:
            path = tenants.path(template, tenants.job_id, tenants.key_ids["a-viewer"])
            answer = await http.request(method, path)
            if "{job_id}" in template or "{key_id}" in template:
                absent = await http.request(method, tenants.path(template, "never-there", "0" * 12))
                assert answer.status_code == absent.status_code == 404, (method, path, answer.text)
                told, other = answer.json(), absent.json()
                asked, missing = path.split("/")[3], "never-there" if "{job_id}" in template else "0" * 12
                assert told["detail"].replace(asked, missing) == other["detail"]
                assert answer.headers.keys() == absent.headers.keys()
            elif "{project}" in template or (template.startswith("/v1/sites") and method != "GET"):
                assert answer.status_code == 403, (method, path)
            else:
                assert answer.status_code in (200, 400, 422), (method, path, answer.text)
            told_back = answer.text.replace(tenants.job_id, "").replace(path, "")
            assert MARK not in told_back, (method, path)
            tried += 1
    assert tried == len(tenants.operations) > 30
    # Nothing was done to it either.
    assert (await tenants.bench.store.get(tenants.job_id)).state.value in ("queued", "starting")


async def test_the_same_routes_are_its_own_projects_to_read(tenants: Tenants) -> None:
    """The test above would pass if nobody saw anything."""
    async with tenants.http("a-viewer") as http:
        (job,) = (await http.get("/v1/jobs")).json()["jobs"]
        assert job["id"] == tenants.job_id
        assert (await http.get(f"/v1/jobs/{tenants.job_id}")).json()["name"] == MARK
        (project,) = (await http.get("/v1/projects")).json()["projects"]
        assert (project["name"], project["max_jobs"]) == ("a", 7)
    async with tenants.http("a-admin") as http:
        assert MARK in (await http.get("/v1/keys")).text
        assert tenants.job_id in json.dumps((await http.post(f"/v1/jobs/{tenants.job_id}/pause")).json())
        (entry,) = (await http.get("/v1/audit")).json()["entries"]
        assert (entry["principal"], entry["status"]) == (f"key:{tenants.key_ids['a-admin']}", 200)
        assert entry["path"] == f"/v1/jobs/{tenants.job_id}/pause"


async def test_every_route_asks_for_a_role(tenants: Tenants) -> None:
    """A viewer changes nothing; a submitter makes no keys, sets no quotas, reads no audit log."""
    admins = ("/v1/keys", "/v1/projects/", "/v1/audit", "/v1/sites")
    refused: dict[str, list[str]] = {"a-viewer": [], "a-submitter": []}
    for who, seen in refused.items():
        async with tenants.http(who) as http:
            for method, template in tenants.operations:
                admin = template.startswith(admins)
                if not admin and (method == "GET" or who == "a-submitter"):
                    continue
                path = tenants.path(template, tenants.job_id, tenants.key_ids["a-admin"])
                answer = await http.request(method, path)
                assert answer.status_code == 403, (who, method, path, answer.text)
                seen.append(path)
    assert len(refused["a-submitter"]) == 10
    assert len(refused["a-viewer"]) > 15
    assert (await tenants.bench.store.get(tenants.job_id)).state.value in ("queued", "starting")


async def test_a_key_submits_to_its_own_project_alone(tenants: Tenants) -> None:
    async with tenants.http("b-submitter") as http:
        answer = await http.post("/v1/jobs", json=document(), headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["project"]) == (201, "b")
        refused = await http.post("/v1/jobs", json=document(project="a"))
        assert refused.status_code == 403
    # One key's idempotency keys are nothing to another project, not even by name.
    async with tenants.http("a-submitter") as http:
        other = await http.post("/v1/jobs", json=document(project="b"), headers={"Idempotency-Key": "k"})
        assert other.status_code == 403
        assert (await http.post("/v1/jobs", json=document(), headers={"Idempotency-Key": "k"})).status_code == 201


async def test_a_job_reads_no_files_of_another_project(tenants: Tenants, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    own = await tenants.bench.store.get(tenants.job_id)
    places = {
        "data": tmp_path / "data" / "tasks.jsonl",
        "theirs": runs / own.id / "checkpoint",
        "secrets": tmp_path / "jobs.db",
        "etc": Path("/etc/passwd"),
        "around": tmp_path / "data" / ".." / "jobs.db",
        "link": tmp_path / "data" / "link",
    }
    places["data"].parent.mkdir()
    places["link"].symlink_to(tmp_path / "jobs.db")
    # Wherever it stands.
    hidden = document(environment={"name": "x", "options": {"parts": [{"data_path": "/etc/passwd"}]}})
    async with tenants.http("a-submitter") as http:
        refused = await http.post("/v1/jobs", json=hidden)
    assert refused.json()["faults"][0]["path"] == "environment.options.parts.0.data_path"
    for who, allowed in (("a-submitter", {"data", "theirs"}), ("b-submitter", {"data"}), ("root", set(places))):
        async with tenants.http(who) as http:
            for name, path in places.items():
                answer = await http.post("/v1/jobs", json=document(tasks={"source": "jsonl", "path": str(path)}))
                assert answer.status_code == (201 if name in allowed else 422), (who, name, answer.text)
                if name not in allowed:
                    assert answer.json()["faults"][0]["path"] == "tasks.path"


async def test_keys_are_rotated_revoked_and_expire(tenants: Tenants) -> None:
    bench = tenants.bench

    async def status(key: str) -> int:
        async with bench.http(key) as http:
            return (await http.get("/v1/caller")).status_code

    async with tenants.http("a-admin") as http:
        old = tenants.key_ids["a-viewer"]
        new = (await http.post(f"/v1/keys/{old}/rotate", json={"grace_s": 3600})).json()
        assert (new["role"], new["project"], new["name"], new["successor_of"]) == ("viewer", "a", MARK, old)
        assert [await status(key) for key in (tenants.keys["a-viewer"], new["key"])] == [200, 200]
        newer = (await http.post(f"/v1/keys/{new['id']}/rotate")).json()
        assert [await status(key) for key in (new["key"], newer["key"])] == [401, 200]
        assert (await http.post(f"/v1/keys/{new['id']}/rotate")).status_code == 409
        assert (await http.delete(f"/v1/keys/{newer['id']}")).status_code == 204
        assert await status(newer["key"]) == 401
        brief = (await http.post("/v1/keys", json={"role": "viewer", "days": 1e-9})).json()
        assert brief["project"] == "a"
        assert await status(brief["key"]) == 401
        listed = {key["id"] for key in (await http.get("/v1/keys")).json()["keys"]}
        assert {new["id"], newer["id"], brief["id"]}.isdisjoint(listed)
        assert (await http.post("/v1/keys", json={"role": "admin", "project": "b"})).status_code == 403
        assert (await http.post("/v1/keys", json={"role": "owner"})).status_code == 422
    # A right id with another secret, and what only looks like a key.
    key = tenants.keys["a-admin"]
    for wrong in (key[:-1] + ("a" if key[-1] != "a" else "b"), key.replace("ls_", "xs_"), key + "a", "ls_"):
        assert await status(wrong) == 401


async def test_no_key_is_kept(tenants: Tenants, tmp_path: Path) -> None:
    # Everything that the database has written, its journal included.
    written = await asyncio.to_thread(lambda: b"".join(path.read_bytes() for path in tmp_path.glob("jobs.db*")))
    assert tenants.key_ids["a-admin"].encode() in written
    for who, key in tenants.keys.items():
        if who != "root":
            assert key.encode() not in written
            assert key.split("_", 2)[2].encode() not in written


async def test_the_audit_log_tells_who_did_what(tenants: Tenants) -> None:
    async with tenants.http("a-submitter") as http:
        await http.post(f"/v1/jobs/{tenants.job_id}/resume%00", headers={"X-Request-Id": "mine-1"})
        await http.post("/v1/keys", json={"role": "admin"}, headers={"X-Request-Id": "mine-2"})
        await http.get("/v1/jobs")
    async with tenants.bench.http() as http:
        await http.post(f"/v1/jobs/{tenants.job_id}/cancel", headers={"X-Request-Id": "not\tsound"})
    async with tenants.http("a-admin") as http:
        first = (await http.get("/v1/audit", params={"limit": 1})).json()
        entries = first["entries"] + (await http.get("/v1/audit", params={"before": first["next"]})).json()["entries"]
    told = [(entry["principal"], entry["method"], entry["status"]) for entry in entries]
    assert told[:2] == [("root", "POST", 200), (f"key:{tenants.key_ids['a-submitter']}", "POST", 403)]
    assert entries[1]["request_id"] == "mine-2"
    assert len(entries[0]["request_id"]) == 24
    async with tenants.http("b-admin") as http:
        assert (await http.get("/v1/audit")).json()["entries"] == []


async def test_requests_and_problems_bear_an_id(tenants: Tenants) -> None:
    async with tenants.http("a-viewer") as http:
        asked = await http.get("/v1/jobs/none", headers={"X-Request-Id": "trace:7"})
        assert (asked.headers["x-request-id"], asked.json()["request_id"]) == ("trace:7", "trace:7")
        own = await http.get("/v1/jobs", headers={"X-Request-Id": "x" * 65})
        assert own.headers["x-request-id"] not in ("", "x" * 65)


async def test_too_many_requests_are_told_to_wait(
    tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "STRANGER_RATE", Rate(per_s=0.001, burst=5))
    bench = GatewayBench(tmp_path, redis)
    bench.rate = Rate(per_s=0.001, burst=20)
    await bench.start()
    async with bench.http("guess") as http:
        statuses = [(await http.get("/v1/caller")).status_code for _ in range(7)]
    assert statuses == [401] * 5 + [429] * 2
    # Who guesses from an address does not lock out who has a key and comes from there, as all do behind a proxy.
    async with bench.http() as http:
        answers = await asyncio.gather(*[http.get("/v1/caller") for _ in range(25)])
        assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["content-type"] == "application/problem+json"
    await bench.stop()


async def test_strangers_words_become_no_metrics(tenants: Tenants) -> None:
    async with tenants.bench.http(None) as http:
        for number in range(3):
            assert (await http.request(f"BREW{number}", "/v1/jobs")).status_code == 405
            assert (await http.get(f"/teapot{number}")).status_code == 404
    told = prometheus_client.generate_latest().decode()
    assert 'longshore_gateway_requests_total{method="other"' in told
    assert "BREW" not in told
    assert "teapot" not in told
