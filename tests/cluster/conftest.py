"""A real cluster with a node, and another that need not have one: `make test-cluster` (docs/kubernetes.md, Tests).

LONGSHORE_TEST_KUBECONFIG       the first one; its nodes find the images longshore-SERVICE:cluster and the broker's
LONGSHORE_TEST_KUBECONFIG_WEST  the second one: objects and reconciliation only
LONGSHORE_TEST_BRIDGE           an address of this machine that pods reach, for a first cluster without a name service,
                                which bare.sh has readied
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import names

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "longshore"
VALUES = Path(__file__).parent / "values.yaml"
SERVICES = ("gateway", "weights", "actor", "verifier", "generator", "learner")


class Cluster:
    """One cluster as kubectl and helm see it, in a namespace of the test's own."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.namespace = f"longshore-test-{secrets.token_hex(3)}"

    def kubectl(self, *arguments: str, timeout: float = 60, given: str | None = None) -> str:
        """In the test's namespace; its output."""
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace, *arguments]
        return _run(command, timeout, given)

    def helm(self, *arguments: str, timeout: float = 900) -> str:
        command = ["helm", "--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace, *arguments]
        return _run(command, timeout)

    def get(self, kinds: str, selector: str = "") -> list[dict[str, Any]]:
        chosen = ("--selector", selector) if selector else ()
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kinds, *chosen, "--output", "json"))["items"]
        return found

    def apply(self, *manifests: dict[str, Any]) -> None:
        self.kubectl("apply", "--filename", "-", given="\n---\n".join(map(json.dumps, manifests)))

    def volume(self, name: str, claim: str, size: str, folder: Path) -> None:
        """A folder of the one node, for one claim."""
        folder.mkdir(parents=True, exist_ok=True)
        node = json.loads(self.kubectl("get", "nodes", "--output", "json"))["items"][0]["metadata"]["name"]
        here = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{self.namespace}-{name}"},
                "spec": {
                    "capacity": {"storage": size},
                    "accessModes": ["ReadWriteOnce"],
                    "local": {"path": str(folder)},
                    "claimRef": {"namespace": self.namespace, "name": claim},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [here]}},
                },
            }
        )


def _run(command: list[str], timeout: float, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def until(condition: Callable[[], bool], timeout: float, what: Callable[[], str] | str) -> None:
    """Fails with `what` when the condition does not hold in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.5)


def _cluster(variable: str) -> Iterator[Cluster]:
    path = os.environ.get(variable)
    if not path:
        reason = f"{variable} names no kubeconfig"
        if os.environ.get("LONGSHORE_REQUIRE_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(Path(path))
    cluster.kubectl("create", "namespace", cluster.namespace)
    try:
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")


@pytest.fixture(scope="session")
def west() -> Iterator[Cluster]:
    yield from _cluster("LONGSHORE_TEST_KUBECONFIG_WEST")


@pytest.fixture(scope="session")
def bare_home() -> Iterator[Cluster]:
    """The first cluster, which may lack names."""
    yield from _cluster("LONGSHORE_TEST_KUBECONFIG")


@pytest.fixture(scope="session")
def home(bare_home: Cluster) -> Cluster:
    """The first cluster, in which pods find each other's names."""
    bridge = os.environ.get("LONGSHORE_TEST_BRIDGE")
    if bridge:
        names.start(bare_home.kubeconfig, bridge)
    return bare_home


@pytest.fixture(scope="session")
def images() -> None:
    """Every image is built by the engine that the node uses, unless LONGSHORE_TEST_IMAGES=built says that all are."""
    if os.environ.get("LONGSHORE_TEST_IMAGES") == "built":
        return
    build = ["docker", "build", "--quiet", "--network=host"]
    standins = ROOT / "tests" / "compose" / "standins"
    _run([*build, "--target", "broker", "--tag", "longshore-standin-broker", str(standins)], 1800)
    for service in SERVICES:
        options = ["--build-arg", f"SERVICE={service}", "--file", str(ROOT / "deploy" / "docker" / "Dockerfile")]
        _run([*build, *options, "--tag", f"longshore-{service}:cluster", str(ROOT)], 1800)
