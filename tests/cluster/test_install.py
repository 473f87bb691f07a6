"""The chart on a real cluster, from outside: installed, a job over REST whose pods the gateway makes, an upgrade while
it trains, things deleted under it, and an uninstall that leaves nothing.

A node, and images that it finds. See conftest.py.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from . import names
from .conftest import CHART, ROOT, VALUES, Cluster, until

# So many that the upgrade falls into them, on a slow machine too.
STEPS = 120
INSTALL_S = 900
JOB_S = 2400
RELEASE = "longshore"
BRIDGE = os.environ.get("LONGSHORE_TEST_BRIDGE")
OURS = "app.kubernetes.io/managed-by=longshore-gateway"
VOLUMES = {"home": ("data-longshore-home-0", "2Gi"), "broker": ("data-longshore-broker-0", "1Gi")}
ALL = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets,pvc"


class Release:
    """One installed chart."""

    def __init__(self, cluster: Cluster, kind: str) -> None:
        self.cluster = cluster
        self.kind = kind

    def settle(self, verb: str, *more: str) -> None:
        """`helm install` or `helm upgrade`, until all of it is ready."""
        options = ["--values", str(VALUES), "--set", f"launcher.kind={self.kind}", *more]
        if self.kind == "kubernetes":
            options += ["--values", str(VALUES.with_name("launcher-values.yaml"))]
        if self.kind == "kubernetes" and BRIDGE:
            options += ["--set", "launcher.kubeconfigSecret=kubeconfigs"]
            options += ["--set", "launcher.home.kubeconfig=/run/secrets/kubeconfigs/home"]
        self.cluster.helm(
            verb, RELEASE, str(CHART), *options, "--wait", "--timeout", f"{INSTALL_S}s", timeout=INSTALL_S + 60
        )

    def client(self) -> httpx.Client:
        (service,) = self.cluster.get("services", "app.kubernetes.io/component=gateway")
        node = self.cluster.get("nodes")[0]
        address = next(one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
        key = base64.b64decode(self._secret()["api_key"]).decode()
        return httpx.Client(
            base_url=f"http://{address}:{service['spec']['ports'][0]['nodePort']}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )

    def _secret(self) -> dict[str, str]:
        found = json.loads(self.cluster.kubectl("get", "secret", "longshore-gateway", "--output", "json"))
        return dict(found["data"])


@pytest.fixture(params=["workers", "kubernetes"])
def release(request: pytest.FixtureRequest, home: Cluster, images: None, tmp_path_factory: Any) -> Iterator[Release]:
    """Installed, and gone afterwards with what it kept."""
    folder = Path(os.environ.get("LONGSHORE_TEST_VOLUMES", "/var/tmp")) / home.namespace
    for name, (claim, size) in VOLUMES.items():
        home.volume(name, claim, size, folder / request.param / name)
    made = Release(home, request.param)
    if request.param == "kubernetes" and BRIDGE:
        give_account(home, BRIDGE)
    try:
        made.settle("install")
        yield made
    finally:
        if home.helm("list", "--short"):
            home.helm("uninstall", RELEASE, "--wait")
        home.kubectl("delete", "pvc", "--all", "--wait=true")
        home.kubectl("delete", "pv", *(f"{home.namespace}-{name}" for name in VOLUMES), "--wait=false")


def give_account(cluster: Cluster, bridge: str) -> None:
    """The gateway's kubeconfig, with the rights of the chart's own role and no more.

    Where pods reach the API server by themselves, the chart's account would do; this machine's is on loopback.
    """
    cluster.kubectl("create", "serviceaccount", "outside")
    cluster.kubectl(
        "create", "rolebinding", "outside", "--role=longshore-launcher", f"--serviceaccount={cluster.namespace}:outside"
    )
    found: list[str] = []

    def token() -> bool:
        account = json.loads(cluster.kubectl("get", "serviceaccount", "outside", "--output", "json"))
        found.extend(one["name"] for one in account.get("secrets", ()))
        return bool(found)

    until(token, 60, "the account gets no token")
    secret = json.loads(cluster.kubectl("get", "secret", found[0], "--output", "json"))
    server = f"https://{bridge}:{names.api_server(cluster.kubeconfig)[1]}"
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "home", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "home", "user": {"token": base64.b64decode(secret["data"]["token"]).decode()}}],
        "contexts": [{"name": "home", "context": {"cluster": "home", "user": "home"}}],
        "current-context": "home",
    }
    given = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "kubeconfigs"},
        "stringData": {"home": yaml.safe_dump(kubeconfig)},
    }
    cluster.apply(given)


def submit(client: httpx.Client) -> str:
    """The first-light job with fewer steps and a smaller evaluation, as a stranger would."""
    document = yaml.safe_load((ROOT / "examples" / "first-light.yaml").read_text())
    document["train"].update({"steps": STEPS, "checkpoint_every": 10})
    document["evaluation"]["tasks"] = 100
    deadline = time.monotonic() + 600
    while True:
        # The first check loads all of reasoning-gym, over which a busy machine takes longer than the gateway waits.
        answer = client.post("/v1/jobs", json=document, headers={"Idempotency-Key": "the-one-job"}, timeout=120)
        if answer.status_code != 503 or time.monotonic() > deadline:
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
    return int(state(client, job)["progress"].get("step") or 0) >= step


@pytest.mark.timeout(2 * JOB_S + INSTALL_S)
def test_a_job_learns_through_an_upgrade_and_nothing_is_left(release: Release) -> None:
    cluster = release.cluster
    with release.client() as client:
        job = submit(client)
        until(lambda: at_step(client, job, 3), JOB_S, lambda: f"it has not begun to train: {pods(cluster)}")
        # Every pod of the release and of the job is made anew, the broker's and the learner's too.
        release.settle("upgrade", "--set", "podLabels.upgraded=yes,logLevel=debug")
        if release.kind == "kubernetes":
            cluster.kubectl(
                "delete", "pods", "--selector", f"{OURS},app.kubernetes.io/component=generator", "--wait=false"
            )
            cluster.kubectl("delete", "service", "--selector", OURS)
            pause_and_resume(cluster, client, job)
        until(
            lambda: state(client, job)["state"] == "succeeded", JOB_S, lambda: f"the job did not end: {pods(cluster)}"
        )
        summary = client.get(f"/v1/jobs/{job}/summary").json()
        assert summary["reward_last"] >= summary["reward_first"] + 0.15
        assert summary["eval_after"] > summary["eval_before"]
        issued = summary["rollouts_issued"]
        assert issued == summary["rollouts_trained"] + sum(summary["rollouts_accounted"].values())
        assert client.get(f"/v1/jobs/{job}/ledger").json()["balanced"] is True
        # What processes wrote is read over REST, wherever they ran.
        assert client.get(f"/v1/jobs/{job}/logs", params={"service": "learner"}).text
        # The job's pods went with it.
        until(lambda: not cluster.get(ALL, OURS), 180, lambda: f"left of the job: {cluster.get(ALL, OURS)}")
    cluster.helm("uninstall", RELEASE, "--wait")
    until(lambda: not left(cluster), 180, lambda: f"left of the release: {left(cluster)}")


def pause_and_resume(cluster: Cluster, client: httpx.Client, job: str) -> None:
    """A paused job has no pods; it goes on from its newest checkpoint."""
    until(lambda: state(client, job)["state"] == "running", 600, "the job does not run")
    assert client.post(f"/v1/jobs/{job}/pause").status_code in (200, 202)
    until(lambda: state(client, job)["state"] == "paused", 600, lambda: f"it is not paused: {state(client, job)}")
    assert not cluster.get("pods,jobs,deployments", OURS)
    step = int(state(client, job)["progress"]["step"])
    assert client.post(f"/v1/jobs/{job}/resume").status_code in (200, 202)
    until(lambda: at_step(client, job, min(STEPS, step + 2)), JOB_S, "it does not go on")


def left(cluster: Cluster) -> list[str]:
    """What is there but what the namespace came with, the test's own, and the volumes with the data."""
    own = ("outside", "kubeconfigs", "default", "kube-root-ca.crt")
    found = [f"{one['kind']}/{one['metadata']['name']}" for one in cluster.get(ALL)]
    return [
        name
        for name in found
        if not name.startswith("PersistentVolumeClaim/") and not name.partition("/")[2].startswith(own)
    ]


def pods(cluster: Cluster) -> list[str]:
    return [f"{pod['metadata']['name']} {pod['status'].get('phase')}" for pod in cluster.get("pods")]
