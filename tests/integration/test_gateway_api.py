"""The gateway's REST API: what every route answers, and to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from gateway_bench import DEADLINE_S, KEY, PROCESSES, GatewayBench, document

from longshore.client import ApiClient
from longshore.config import JobSpec
from longshore.errors import ConfigError, Fault, InvalidJobSpec, NotFound, Unavailable
from longshore.gateway import jobs
from longshore.launcher.spec import UnitState
from longshore.rpc.http_server import serve_http

ROUTES = [
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/x"),
    ("POST", "/v1/jobs/x/cancel"),
    ("GET", "/v1/jobs/x/events"),
    ("GET", "/v1/jobs/x/logs"),
    ("GET", "/v1/jobs/x/summary"),
    ("GET", "/v1/jobs/x/ledger"),
    ("POST", "/v1/jobs/x/verdicts"),
    ("GET", "/v1/jobs/x/dead-letters"),
    ("GET", "/v1/jobs/x/dead-letters/1-0"),
    ("POST", "/v1/jobs/x/dead-letters/1-0/requeue"),
]


def problem_of(response: httpx.Response, status: int) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = response.json()
    assert body["status"] == status
    assert body["detail"]
    return body


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x"])
async def test_every_route_wants_the_key(bench: GatewayBench, key: str | None) -> None:
    async with bench.http(key) as http:
        for method, path in ROUTES:
            response = await http.request(method, path)
            problem_of(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/healthz")).json()["status"] == "serving"


async def test_every_error_is_a_problem(bench: GatewayBench) -> None:
    async with bench.http() as http:
        for method, path in ROUTES[2:]:
            assert "no job x" in str(problem_of(await http.request(method, path), 404)["detail"])
        problem_of(await http.get("/v1/nothing"), 404)
        problem_of(await http.delete("/v1/jobs"), 405)
        faults = problem_of(await http.get("/v1/jobs", params={"limit": "0"}), 422)["faults"]
        assert isinstance(faults, list)
        assert faults[0]["path"] == "query.limit"
        events = f"/v1/jobs/{await bench.submit()}/events"
        problem_of(await http.get(events, headers={"Last-Event-ID": "abc"}), 422)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b"\xff", 400),
        ("application/yaml", b"a: [", 400),
        ("application/yaml", b"a: &x [1]\nb: *x\n", 400),
        ("application/yaml", b"- " * 3000, 400),
        # As deep as a body has room for: an hour's work for a parser that follows it.
        ("application/yaml", b"[" * 1024 * 1024, 400),
        ("application/json", b'{"name": "a", "name": "b"}', 400),
        ("application/json", b'{"name": "\\ud800", "\\udfff": "\\ud800"}', 422),
        ("application/json", b'{"seed": 1' + b"0" * 4000 + b"}", 422),
        ("application/json", b" " * (1024 * 1024 + 1), 413),
        ("text/html", b"{}", 415),
        ("application/json", b"[]", 422),
        ("application/json", b'{"name": NaN}', 422),
        ("application/yaml", b"name: 2024-01-01\n", 422),
    ],
)
async def test_bodies_that_are_no_job(bench: GatewayBench, content_type: str, body: bytes, status: int) -> None:
    async with bench.http() as http:
        response = await http.post("/v1/jobs", content=body, headers={"Content-Type": content_type})
    problem_of(response, status)
    assert await bench.store.newest(10) == []


async def test_all_faults_of_a_spec_are_listed(bench: GatewayBench) -> None:
    wrong = document(train={"steps": 0, "group_size": 1, "stepz": 2}, seed="x")
    async with bench.http() as http:
        problem = problem_of(await http.post("/v1/jobs", json=wrong), 422)
    faults = problem["faults"]
    assert isinstance(faults, list)
    assert {fault["path"] for fault in faults} == {"train.steps", "train.group_size", "train.stepz", "seed"}
    assert "group_size" in next(fault["message"] for fault in faults if fault["path"] == "train.stepz")
    assert "4 faults" in str(problem["detail"])


async def test_a_body_full_of_faults_gets_a_short_answer(bench: GatewayBench) -> None:
    async with bench.http() as http:
        problem = problem_of(await http.post("/v1/jobs", json=document() | {f"k{n}": n for n in range(5000)}), 422)
    faults = problem["faults"]
    assert isinstance(faults, list)
    assert len(faults) == 200
    assert problem["detail"] == "the job has 5000 faults; the first 200 are listed"


async def test_faults_of_the_check_refuse_the_job_too(bench: GatewayBench) -> None:
    bench.faults = [Fault("tasks.path", "/x", "no such file"), Fault("verifier.name", "y", "is not installed")]
    async with ApiClient(bench.url, KEY) as client:
        with pytest.raises(InvalidJobSpec) as refused:
            await client.submit(document())
    assert refused.value.faults == bench.faults
    assert await bench.store.newest(10) == []


async def test_whoever_gives_up_before_the_answer_gets_no_job(bench: GatewayBench) -> None:
    bench.may_pass.clear()
    async with ApiClient(bench.url, KEY) as client:
        submitting = asyncio.create_task(client.submit(document()))

        async def checking() -> bool:
            return bench.checks == 1

        await bench.until(checking)
        submitting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await submitting
        bench.may_pass.set()
        # The next one's check comes after it.
        job = await client.submit(document())
    assert [stored.id for stored in await bench.store.newest(10)] == [job["id"]]


async def test_checks_that_do_not_end_take_no_more_threads(
    bench: GatewayBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CHECK_TIMEOUT_S", 0.05)
    bench.may_pass.clear()
    async with bench.http() as http:
        for _ in range(4):
            assert (await http.post("/v1/jobs", json=document())).status_code == 503
        assert bench.checks == 2
        bench.may_pass.set()
        monkeypatch.setattr(jobs, "CHECK_TIMEOUT_S", 20.0)
        assert (await http.post("/v1/jobs", json=document())).status_code == 201


async def test_yaml_is_as_good_as_json(bench: GatewayBench) -> None:
    spec = document(seed=7)
    async with bench.http() as http:
        body = json.dumps(spec).encode()
        response = await http.post(
            "/v1/jobs", content=body, headers={"Content-Type": "application/yaml; charset=utf-8"}
        )
        assert response.status_code == 201
        job = response.json()
        assert job["id"].startswith(f"{spec['name']}-")
        assert len(job["id"]) == len(str(spec["name"])) + 7
        assert (job["project"], job["state"]) == ("default", "queued")
        assert JobSpec.model_validate((await http.get(f"/v1/jobs/{job['id']}")).json()["spec"]).seed == 7
        listed = (await http.get("/v1/jobs")).json()["jobs"]
        assert [item["id"] for item in listed] == [job["id"]]
        assert listed[0]["spec"] is None


async def test_an_event_stream_resumes_after_an_id(bench: GatewayBench) -> None:
    job_id = await bench.running()
    bench.launcher.becomes(job_id, UnitState.FAILED, "x")
    await bench.until_state(job_id, "failed")
    async with bench.http() as http:
        whole = (await http.get(f"/v1/jobs/{job_id}/events")).text
        ids = [line.removeprefix("id: ") for line in whole.splitlines() if line.startswith("id: ")]
        assert ids == sorted(set(ids), key=int)
        rest = (await http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": ids[1]})).text
        assert rest == whole.partition(f"id: {ids[2]}\n")[1] + whole.partition(f"id: {ids[2]}\n")[2]
        # Past the end there is nothing to wait for.
        assert (await http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": ids[-1]})).text == ""


async def test_logs_and_summary(bench: GatewayBench) -> None:
    job_id = await bench.running()
    folder = bench.folder / "runs" / job_id
    (folder / "logs").mkdir(parents=True)
    for name in PROCESSES:
        (folder / "logs" / f"{name}.log").write_text("".join(f"{name} {line}\n" for line in range(3)))
    async with bench.http() as http:
        path = f"/v1/jobs/{job_id}"
        response = await http.get(f"{path}/logs", params={"service": "actor", "tail": 2})
        assert response.headers["content-type"].startswith("text/plain")
        assert response.text == "actor-0 1\nactor-0 2\n"
        assert "learner | learner 0\n" in (await http.get(f"{path}/logs")).text
        assert "there are: actor-0, learner" in str(
            problem_of(await http.get(f"{path}/logs", params={"service": "../../jobs"}), 404)["detail"]
        )
        problem_of(await http.get(f"{path}/summary"), 404)
        (folder / "summary.json").write_text('{"state": "succeeded"}')
        assert (await http.get(f"{path}/summary")).json() == {"state": "succeeded"}


async def test_followed_logs_end_with_the_job(bench: GatewayBench) -> None:
    job_id = await bench.running()
    log = bench.folder / "runs" / job_id / "logs" / "learner.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    pieces: list[str] = []
    async with ApiClient(bench.url, KEY) as client, asyncio.timeout(DEADLINE_S):
        async for text in client.logs(job_id, "learner", 10, follow=True):
            pieces.append(text)
            if len(pieces) == 1:
                log.write_text("one\ntwo\n")
                bench.launcher.becomes(job_id, UnitState.FAILED, "x")
    assert "".join(pieces) == "one\ntwo\n"


async def test_a_client_without_a_gateway_says_so() -> None:
    async with ApiClient("http://127.0.0.1:1", KEY, patience_s=0) as client:
        with pytest.raises(Unavailable, match="does not answer"):
            await client.jobs()


async def test_a_client_waits_for_a_gateway_that_starts_again(bench: GatewayBench) -> None:
    await bench.stop()
    async with ApiClient(bench.url, KEY) as client:
        asking = asyncio.create_task(client.jobs())
        await asyncio.sleep(0.1)
        assert not asking.done()
        await bench.start()
        assert await asking == []


async def test_a_client_tells_what_is_missing(bench: GatewayBench) -> None:
    async with ApiClient(bench.url, KEY) as client:
        with pytest.raises(NotFound, match="no job nobody"):
            async for _ in client.events("nobody"):
                pass


async def test_the_description_of_the_api_is_valid(bench: GatewayBench) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    async with bench.http(None) as http:
        description = (await http.get("/openapi.json")).json()
    validator.validate(description)
    body = description["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/yaml"}


async def nothing(*_: object) -> None:
    """An ASGI application that is never called."""


async def test_a_taken_port_is_refused() -> None:
    with contextlib.closing(await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.sockets[0].getsockname()[1]}"
        with pytest.raises(ConfigError, match="LONGSHORE_HTTP_LISTEN"):
            await serve_http(nothing, listen, 1.0, asyncio.Event(), nothing)
