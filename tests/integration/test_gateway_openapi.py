"""The OpenAPI document against the running gateway: whatever is sent, the answer is one that the document tells of."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_bench import KEY, GatewayBench, document
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from longshore.client import ApiClient, Client
from longshore.gateway import driver, openapi
from longshore.gateway.rate_limit import Rate
from longshore.launcher.spec import UnitState

schemathesis = pytest.importorskip("schemathesis")

# Requests to each operation; `make test-api` sends more.
EXAMPLES = int(os.environ.get("LONGSHORE_API_EXAMPLES", "3"))
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def bench(tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GatewayBench]:
    monkeypatch.setattr(driver, "BLOCK_MS", 20)
    bench = GatewayBench(tmp_path, redis)
    bench.rate = Rate(1e6, 1_000_000)
    await bench.start()
    yield bench
    await bench.stop()


async def test_whatever_is_sent_the_answer_is_as_described(bench: GatewayBench) -> None:
    """No 5xx, no undocumented status, content type or shape; nothing without a key. The document itself is valid."""
    job_id = await bench.running()
    bench.launcher.becomes(job_id, UnitState.FAILED, "x")
    await bench.until_state(job_id, "failed")
    tried = await asyncio.to_thread(attack, bench.url, job_id)
    assert tried == {operation["operationId"] for path in _paths().values() for operation in path.values()}


def attack(url: str, job_id: str) -> set[str]:
    """Sends EXAMPLES requests to every operation; returns those that were tried."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tried: set[str] = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), real=st.booleans())
        def check(case, real) -> None:
            if real and "job_id" in (case.path_parameters or {}):
                # Random ids would never get past the first door.
                case.path_parameters["job_id"] = job_id
            case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=checks, timeout=20)
            stranger = case.call(headers={"Authorization": "Bearer wrong"}, timeout=20)
            assert stranger.status_code in ((200,) if case.path == "/healthz" else (401, 429)), stranger.text

        check()
        tried.add(operation.definition.raw["operationId"])
    return tried


def _paths() -> dict[str, dict[str, dict[str, str]]]:
    paths: dict[str, dict[str, dict[str, str]]] = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]
    return paths


async def test_the_document_that_is_checked_in_is_the_one_that_is_served(bench: GatewayBench) -> None:
    async with bench.http(None) as http:
        served = (await http.get("/openapi.json")).json()
    assert served == await openapi.document() == json.loads((ROOT / "docs" / "openapi.json").read_text())


@pytest.mark.parametrize("client", [ApiClient, Client])
def test_each_operation_is_a_method_of_each_client(client: type) -> None:
    operations = {operation["operationId"] for path in _paths().values() for operation in path.values()}
    methods = {name for name in vars(client) if not name.startswith("_")}
    assert methods == operations


async def test_the_plain_client_does_what_the_other_does(bench: GatewayBench, tmp_path: Path) -> None:
    def use() -> None:
        with Client(bench.url, KEY) as client:
            job = client.submit(document(), idempotency_key="k")
            assert client.submit(client.job(job["id"])["spec"] or {}, idempotency_key="k2")["id"] != job["id"]
            assert [item["id"] for item in client.jobs(1)] != [job["id"]]
            assert {item["id"] for item in client.jobs()} >= {job["id"]}
            assert client.caller()["role"] == "admin"
            assert client.cancel(job["id"])["state"] in ("cancelling", "cancelled")
            events = list(client.events(job["id"]))
            assert events[-1]["state"] == "cancelled"
            assert client.healthz()["status"] == "serving"

    await asyncio.to_thread(use)
