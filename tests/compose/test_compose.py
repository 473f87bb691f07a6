"""A job on docker-compose.yml, submitted over REST: its reward rises, containers are killed, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from .conftest import ROOT, SERVICES, Compose, docker, inspect

STEPS = 40
JOB_S = 2400
BASE = os.environ.get("LONGSHORE_BASE_IMAGE", "python:3.11-slim")
# Gateway and verifier carry reasoning-gym, which brings sympy and matplotlib (docs/deploy.md).
MOST_MB = {"weights": 150, "actor": 150, "gateway": 350, "verifier": 350}


def until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.mark.parametrize("service", sorted(MOST_MB))
def test_an_image_without_torch_is_small(images: Compose, service: str) -> None:
    base, own = (inspect("image", name)["Size"] for name in (BASE, f"longshore-{service}:test"))
    assert (own - base) / 1e6 <= MOST_MB[service]
    found = docker(
        "run", "--rm", "--entrypoint", "find", f"longshore-{service}:test", "/opt/longshore", "-name", "torch"
    )
    assert found.strip() == ""


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_runs_as_nobody_in_particular_and_holds_no_tools(images: Compose, service: str) -> None:
    image = f"longshore-{service}:test"
    config = inspect("image", image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    look = "command -v gcc cc; find /opt/longshore -path '*/codec/_kernel.so'; id -u"
    said = docker("run", "--rm", "--entrypoint", "sh", image, "-c", look).split()
    # No compiler; the kernel that one made; the user.
    assert len(said) == 2
    assert said[0].endswith("/codec/_kernel.so")
    assert said[1] == "10001"


def test_no_container_may_write_its_root_or_do_what_root_does(stack: Compose) -> None:
    for name in stack("ps", "--quiet").split():
        container = inspect("container", name)
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"] is True, container["Name"]
        assert host["CapDrop"] == ["ALL"], container["Name"]
        assert "no-new-privileges:true" in host["SecurityOpt"], container["Name"]
        assert container["Config"]["User"] not in ("", "0", "root"), container["Name"]
        secrets = stack.api_key(), (stack.secrets / "postgres_password").read_text()
        assert not any(secret in json.dumps(container) for secret in secrets), container["Name"]


@pytest.fixture(scope="session")
def client(stack: Compose) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {stack.api_key()}"}, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def job(client: httpx.Client) -> str:
    """The first-light job with fewer steps and a smaller evaluation, submitted as a stranger would."""
    document = yaml.safe_load((ROOT / "examples" / "first-light.yaml").read_text())
    document["train"].update({"steps": STEPS, "checkpoint_every": 10})
    document["evaluation"]["tasks"] = 100
    # The first check loads all of reasoning-gym, over which a busy machine takes longer than the gateway waits.
    for _ in range(5):
        answer = client.post("/v1/jobs", json=document, headers={"Idempotency-Key": "the-one-job"}, timeout=120)
        if answer.status_code != 503:
            break
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["id"])


def state(client: httpx.Client, job: str) -> dict[str, Any]:
    try:
        answer = client.get(f"/v1/jobs/{job}")
    except httpx.TransportError:
        return {"state": "away", "progress": {}}
    if answer.status_code >= 500:
        return {"state": "away", "progress": {}}
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert body["state"] not in ("failed", "cancelled"), body
    return body


def at_step(client: httpx.Client, job: str, step: int) -> bool:
    progress = state(client, job)["progress"]
    return int(progress.get("step") or 0) >= step


def kill(stack: Compose, service: str) -> None:
    """As a machine that is out of memory does it: from outside, and the engine starts it again."""
    name = stack.containers(service)[0]
    before = inspect("container", name)
    os.kill(before["State"]["Pid"], signal.SIGKILL)
    until(
        lambda: (
            (now := inspect("container", name))["State"]["Running"] and now["RestartCount"] > before["RestartCount"]
        ),
        120,
        f"{service} did not come back",
    )


def test_the_reward_rises_and_nothing_is_lost_when_containers_are_killed(
    stack: Compose, client: httpx.Client, job: str
) -> None:
    until(lambda: at_step(client, job, 3), JOB_S, "the job has not begun to train")
    kill(stack, "actor")
    kill(stack, "gateway")
    until(lambda: at_step(client, job, 8), JOB_S, "the job does not go on without an actor and the gateway")
    check_dashboards(stack)
    kill(stack, "learner")
    kill(stack, "generator")
    kill(stack, "broker")
    until(lambda: state(client, job)["state"] == "succeeded", JOB_S, "the job did not end")

    summary = client.get(f"/v1/jobs/{job}/summary").json()
    assert summary["reward_last"] >= summary["reward_first"] + 0.15
    assert summary["eval_after"] > summary["eval_before"]
    assert summary["rollouts_issued"] == summary["rollouts_trained"] + sum(summary["rollouts_accounted"].values())
    ledger = client.get(f"/v1/jobs/{job}/ledger").json()
    assert ledger, "there is a ledger"


def check_dashboards(stack: Compose) -> None:
    """Every query of every dashboard gives something while a job runs."""
    for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
        for query in queries:
            filled = query.replace("$__rate_interval", "1m").replace("$project", ".*").replace("$job", ".*")
            until(lambda: bool(ask(stack, filled)), 120, f"{path.name}: {filled} gives nothing")  # noqa: B023 - at once


def ask(stack: Compose, query: str) -> list[Any]:
    url = f"{stack.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        found: list[Any] = json.load(answer)["data"]["result"]
    return found


def test_prometheus_reaches_every_container(stack: Compose) -> None:
    def counts() -> dict[str, int]:
        return {
            item["metric"]["service"]: int(item["value"][1])
            for item in ask(stack, 'sum by (service) (up{service!=""})')
        }

    wanted = {service: 2 if service == "actor" else 1 for service in SERVICES}
    until(lambda: counts() == wanted, 120, "not every container is scraped")
