"""A cluster's API in memory, and a job planned for clusters: for the Kubernetes launcher's tests without a cluster.

tests/cluster has real API servers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longshore.config import JobSpec
from longshore.errors import Rejected
from longshore.launcher.kubernetes.cluster_settings import KubernetesSettings
from longshore.launcher.kubernetes.site_brokers import cluster_brokers
from longshore.launcher.kubernetes.wanted import JobTexts, Manifest, SiteWork, site_work
from longshore.launcher.kubernetes.watcher import NoAnswer
from longshore.launcher.plan import Endpoints, JobPaths, plan_job
from longshore.launcher.spec import ProcessSpec
from longshore.settings import JobFile

KINDS = frozenset({"apps/v1", "batch/v1", "networking.k8s.io/v1", "policy/v1"})


class MemoryCluster:
    """Stores what is applied, and collects what has lost its owner, as an API server and its controllers do."""

    def __init__(self, kinds: frozenset[str] = KINDS) -> None:
        self.down = False
        self.refuses: str | None = None
        self.applied: list[tuple[str, str]] = []
        self.objects: dict[tuple[str, str], Manifest] = {}
        self._kinds = kinds
        self._numbers = itertools.count(1)

    async def kinds(self) -> frozenset[str]:
        self._reach()
        return self._kinds

    async def get(self, api_version: str, kind: str, name: str) -> Manifest | None:
        self._reach()
        return copy.deepcopy(self.objects.get((kind, name)))

    async def list(self, api_version: str, kind: str, labels: Mapping[str, str]) -> list[Manifest]:
        self._reach()
        return [
            copy.deepcopy(found)
            for key, found in self.objects.items()
            if key[0] == kind and labels.items() <= found["metadata"].get("labels", {}).items()
        ]

    async def apply(self, manifest: Manifest) -> Manifest:
        self._reach()
        if self.refuses == manifest["kind"]:
            raise Rejected("cluster", f"{self.refuses} is invalid")
        key = manifest["kind"], manifest["metadata"]["name"]
        self.applied.append(key)
        known = self.objects.get(key)
        made = copy.deepcopy(manifest)
        meta = made["metadata"]
        meta["uid"] = known["metadata"]["uid"] if known else f"uid-{next(self._numbers)}"
        same = known is not None and known.get("spec") == made.get("spec") and known.get("data") == made.get("data")
        meta["resourceVersion"] = known["metadata"]["resourceVersion"] if known and same else str(next(self._numbers))
        if "spec" in made:
            meta["generation"] = (known["metadata"]["generation"] + (not same)) if known else 1
        if known and "status" in known:
            made["status"] = known["status"]
        self.objects[key] = made
        return copy.deepcopy(made)

    async def delete(self, api_version: str, kind: str, name: str) -> None:
        self._reach()
        self.objects.pop((kind, name), None)
        self._collect()

    async def log(self, pod: str, since_s: int, limit_bytes: int) -> str:
        self._reach()
        return f"2026-01-01T00:00:00Z {pod} speaks\n" if ("Pod", pod) in self.objects else ""

    async def close(self) -> None:
        """There is nothing."""

    def edit(self, kind: str, name: str, **spec: Any) -> None:
        """As somebody with kubectl does it."""
        found = self.objects[kind, name]
        found["spec"] |= spec
        found["metadata"]["generation"] += 1

    def run_pods(self, ready: bool = True) -> None:
        """Gives each Deployment, StatefulSet and Job the pods that it asks for."""
        for (kind, name), owner in list(self.objects.items()):
            if kind not in ("Deployment", "StatefulSet", "Job"):
                continue
            for index in range(owner["spec"].get("replicas", 1)):
                if ("Pod", f"{name}-{index}") not in self.objects:
                    self.add_pod(kind, name, index, ready)

    def add_pod(self, kind: str, owner: str, index: int, ready: bool = True, **container: Any) -> str:
        """One pod of a workload; `container`: its containerStatus."""
        made = self.objects[kind, owner]
        name = f"{owner}-{index}"
        number = next(self._numbers)
        status = {"ready": ready, "started": ready, "restartCount": 0, "state": {"running": {}}, **container}
        self.objects["Pod", name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "uid": f"uid-{number}",
                "labels": dict(made["spec"]["template"]["metadata"]["labels"]),
                "creationTimestamp": f"2026-01-01T00:00:{number % 60:02d}Z",
                "ownerReferences": [{"uid": made["metadata"]["uid"]}],
            },
            "status": {"phase": "Running", "containerStatuses": [status]},
        }
        return name

    def names(self, kind: str) -> set[str]:
        return {name for found, name in self.objects if found == kind}

    def _reach(self) -> None:
        if self.down:
            raise NoAnswer("the cluster does not answer")

    def _collect(self) -> None:
        while True:
            uids = {found["metadata"]["uid"] for found in self.objects.values()}
            lost = [
                key
                for key, found in self.objects.items()
                if (owners := found["metadata"].get("ownerReferences"))
                and all(one["uid"] not in uids for one in owners)
            ]
            if not lost:
                return
            for key in lost:
                del self.objects[key]


def cluster_settings(**clusters: dict[str, Any]) -> KubernetesSettings:
    """Home and west; what is given is laid over theirs."""
    home = {
        "namespace": "longshore",
        "tlsSecret": "certificates",
        "weights": "longshore-weights.longshore.svc:7443",
        "homeClaim": "data-longshore-home-0",
    }
    west = {
        "kubeconfig": "/etc/kube/west",
        "namespace": "rollouts",
        "tlsSecret": "certificates",
        "homeWeights": "weights.example.com:7443",
        "homeBrokerSecret": "home-broker",
    }
    given = {"home": home | clusters.get("home", {}), "west": west | clusters.get("west", {})}
    return KubernetesSettings.model_validate({"image": {"tag": "1"}, "clusters": given})


def plan_in(folder: Path, settings: KubernetesSettings, unit: str = "j-1", **spec: Any) -> list[ProcessSpec]:
    """A job's plan, with the files that the gateway would have written."""
    document = {
        "name": "j",
        "tasks": {"source": "jsonl"},
        "verifier": {"name": "exact-match"},
        "train": {"steps": 3},
        **spec,
    }
    file = JobFile(project="default", job=unit, spec=JobSpec.model_validate(document), learner_public_key="ab" * 32)
    paths = JobPaths(folder / "runs" / unit, folder / "state" / "jobs" / unit / "learner.key")
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    paths.signing_key_file.parent.mkdir(parents=True, exist_ok=True)
    paths.job_file.write_text(file.model_dump_json())
    paths.openai_keys_file.write_text("local " + "0" * 64 + "\n")
    sites = [site.name for site in file.spec.sites]
    brokers = cluster_brokers(unit, sites, paths.signing_key_file.parent, settings)
    endpoints = Endpoints("redis://:secret@longshore-broker:6379/0", settings.home.weights)
    return plan_job(file, endpoints, paths, brokers)


def works_in(folder: Path, settings: KubernetesSettings, **spec: Any) -> dict[str, SiteWork]:
    """A job's plan by site."""
    specs = plan_in(folder, settings, **spec)
    file = JobFile.model_validate_json((folder / "runs" / "j-1" / "job.json").read_text())
    return site_work("j-1", "default", file.spec, JobTexts(file.model_dump_json(), "local 00\n"), specs)
