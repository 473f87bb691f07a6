"""The Kubernetes launcher against two real API servers: objects, drift, restarts, a cluster that is away.

The launcher runs in the test's process. No pod needs to run: the second cluster has no node, and in the first one the
images of these jobs are names of nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import yaml
from kube import plan_in

from longshore.launcher.kubernetes.cluster import connect
from longshore.launcher.kubernetes.cluster_settings import KubernetesSettings
from longshore.launcher.kubernetes.launcher import KubernetesLauncher
from longshore.launcher.kubernetes.scale import Demand
from longshore.launcher.spec import UnitState, UnitStatus

from . import names
from .conftest import Cluster

SITES: dict[str, Any] = {"sites": [{"name": "west", "actors": 1}], "resources": {"actors": 2}}
OURS = "app.kubernetes.io/managed-by=longshore-gateway"
MADE = "configmaps,secrets,services,deployments,statefulsets,jobs,poddisruptionbudgets,networkpolicies,pvc"


class Bench:
    """A launcher, its settings and what it says."""

    def __init__(self, home: Cluster, west: Cluster, west_kubeconfig: Path | None = None) -> None:
        shared = {"tlsSecret": "certificates"}
        self.home, self.west = home, west
        document = {
            # Nothing of this name is anywhere: pods are made, and wait.
            "image": {"tag": "none", "prefix": "longshore-nowhere", "pullPolicy": "IfNotPresent"},
            "clusters": {
                "home": {
                    **shared,
                    "kubeconfig": str(home.kubeconfig),
                    "namespace": home.namespace,
                    "weights": "weights.invalid:7443",
                    "homeClaim": "data",
                },
                "west": {
                    **shared,
                    "kubeconfig": str(west_kubeconfig or west.kubeconfig),
                    "namespace": west.namespace,
                    "homeWeights": "weights.invalid:7443",
                    "homeBrokerSecret": "home-broker",
                    "storage": {"size": "1Gi"},
                },
            },
        }
        self.settings = KubernetesSettings.model_validate(document)
        self.demand = Demand(0, 0)
        self.units: dict[str, UnitStatus] = {}

    @contextlib.asynccontextmanager
    async def launcher(self) -> AsyncIterator[KubernetesLauncher]:
        async def lag(job: str, project: str, site: str) -> Demand:
            return self.demand

        made = KubernetesLauncher(self.settings, connect, lag)

        async def follow() -> None:
            async for units in made.watch():
                self.units = units

        task = asyncio.create_task(follow())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            # What changes is in another process.
            while not await asyncio.to_thread(condition):  # noqa: ASYNC110
                await asyncio.sleep(0.3)


def objects(cluster: Cluster, job: str = "j-1") -> dict[str, dict[str, Any]]:
    found = cluster.get(MADE, f"{OURS},longshore.dev/job={job}")
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def versions(cluster: Cluster) -> dict[str, tuple[str, int]]:
    """What changes when somebody changes what an object shall be."""
    return {
        name: (one["metadata"]["uid"], one["metadata"].get("generation", 0)) for name, one in objects(cluster).items()
    }


async def test_a_job_lives_in_two_clusters_is_mended_and_leaves_nothing(
    bare_home: Cluster, west: Cluster, tmp_path: Path
) -> None:
    bench = Bench(bare_home, west)
    plan = plan_in(tmp_path, bench.settings, **SITES)
    async with bench.launcher() as launcher:
        await launcher.apply("j-1", plan)
        await bench.until(lambda: len(objects(bare_home)) == 13 and len(objects(west)) == 18)
        assert {name for name in objects(bare_home) if name.startswith("Job/")} == {"Job/ls-j-1-learner"}
        # All but the anchor belong to it.
        for cluster, anchor in ((bare_home, "ls-j-1"), (west, plan_base(west))):
            for name, one in objects(cluster).items():
                owners = [owner["name"] for owner in one["metadata"].get("ownerReferences", ())]
                assert owners == ([] if name == f"ConfigMap/{anchor}" else [anchor]), name
        await bench.until(lambda: "j-1" in bench.units)
        assert bench.units["j-1"].state is UnitState.RUNNING
        before = versions(bare_home), versions(west)
        await asyncio.sleep(8)
        assert (versions(bare_home), versions(west)) == before, "it changes what is as it should be"

        bare_home.kubectl("scale", "deployment/ls-j-1-actor", "--replicas=0")
        bare_home.kubectl("delete", "service/ls-j-1-generator", "networkpolicy/ls-j-1-verifier")
        await bench.until(lambda: objects(bare_home)["Deployment/ls-j-1-actor"]["spec"]["replicas"] == 2)
        await bench.until(lambda: len(objects(bare_home)) == 13)

    before = versions(bare_home), versions(west)
    bench.units = {}
    async with bench.launcher() as again:
        # Another incarnation sees what is there, takes it over, and touches nothing.
        await bench.until(lambda: "j-1" in bench.units)
        await again.apply("j-1", plan)
        await asyncio.sleep(8)
        assert (versions(bare_home), versions(west)) == before
        await again.remove("j-1", "the test's end")
        assert objects(bare_home) == {}
        await bench.until(lambda: objects(west) == {})


def plan_base(cluster: Cluster) -> str:
    (anchor,) = (one["metadata"]["name"] for one in cluster.get("configmaps", OURS))
    return str(anchor)


async def test_a_cluster_that_is_cut_off_holds_up_no_other_and_is_cleaned_up_when_it_is_back(
    bare_home: Cluster, west: Cluster, tmp_path: Path
) -> None:
    # A way to the second cluster that can be closed.
    host, port = names.api_server(west.kubeconfig)
    way = names.Way("127.0.0.1", (host, port))
    document = yaml.safe_load(west.kubeconfig.read_text())
    document["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{way.port}"
    through = tmp_path / "west.kubeconfig"
    through.write_text(yaml.safe_dump(document))
    bench = Bench(bare_home, west, through)
    async with bench.launcher() as launcher:
        await launcher.apply("j-1", plan_in(tmp_path, bench.settings, **SITES))
        await bench.until(lambda: len(objects(west)) == 18)
        way.close()
        # Another job, here alone, starts meanwhile; and the first one goes.
        await launcher.apply("j-2", plan_in(tmp_path, bench.settings, unit="j-2"))
        await bench.until(lambda: len(objects(bare_home, "j-2")) == 13)
        await asyncio.sleep(20)
        await asyncio.wait_for(launcher.remove("j-1", "cancelled"), 60)
        assert objects(bare_home) == {}
        assert len(objects(west)) == 18
    # The gateway is started again before the cluster is back: all that is known of the job is there.
    async with bench.launcher() as again:
        await bench.until(lambda: "j-2" in bench.units)
        way.open()
        await bench.until(lambda: "j-1" in bench.units, 120)
        await again.remove("j-1", "its job has ended")
        await bench.until(lambda: objects(west) == {})
        await again.remove("j-2", "the test's end")
    way.close()


async def test_an_object_that_is_refused_ends_its_job_and_no_other(
    bare_home: Cluster, west: Cluster, tmp_path: Path
) -> None:
    bench = Bench(bare_home, west)
    wrong = {"services": {"actor": {"runtimeClassName": "No Such Name"}}}
    document = bench.settings.model_dump(by_alias=True, mode="json")
    document["clusters"]["west"] |= wrong
    bench.settings = KubernetesSettings.model_validate(document)
    async with bench.launcher() as launcher:
        await launcher.apply("j-3", plan_in(tmp_path, bench.settings, unit="j-3", **SITES))
        await launcher.apply("j-4", plan_in(tmp_path, bench.settings, unit="j-4"))
        await bench.until(lambda: "j-3" in bench.units and bench.units["j-3"].state is UnitState.FAILED)
        assert "No Such Name" in bench.units["j-3"].message
        await bench.until(lambda: len(objects(bare_home, "j-4")) == 13)
        assert bench.units["j-4"].state is UnitState.RUNNING
        await launcher.remove("j-3", "it failed")
        assert objects(west, "j-3") == {}
        await launcher.remove("j-4", "the test's end")
