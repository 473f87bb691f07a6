"""A job at a site as Kubernetes' objects, plain values ready to be applied. Pure: asks no cluster anything.

One ConfigMap is the anchor: it has the job's job.json, and owns all that the job has in the cluster, so that with it
everything goes. The anchor itself belongs to the gateway's release, where that is in the cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from longshore.launcher.kubernetes import pods
from longshore.launcher.kubernetes.cluster_settings import ClusterSettings, KubernetesSettings, Service, StorageSettings
from longshore.launcher.kubernetes.keda import KEDA, keda_scales, scaled_object
from longshore.launcher.kubernetes.wanted import (
    BROKER_PORT,
    GRPC_PORT,
    HASH_ANNOTATION,
    JOB_LABEL,
    MANAGER,
    METRICS_PORT,
    OPENAI_PORT,
    PROJECT_LABEL,
    SITE_LABEL,
    Manifest,
    SiteWork,
)

# The learner's container is started again in its pod, and the launcher gives up on it by its own rules.
_BACKOFF_LIMIT = 1000
_JOBSET = "jobset.x-k8s.io/v1alpha2"


@dataclass(frozen=True)
class Around:
    """What a cluster has beside what is wanted of it.

    `kinds`: API groups with versions. `owner`, `anchor`: owner references for the anchor, and for what it owns, once
    they can be known. `replicas`: of services that are scaled.
    """

    kinds: frozenset[str] = frozenset()
    owner: Manifest | None = None
    anchor: Manifest | None = None
    replicas: Mapping[Service, int] = field(default_factory=dict)


def manifests(work: SiteWork, cluster: ClusterSettings, shared: KubernetesSettings, around: Around) -> list[Manifest]:
    """Every object of a job at a site, the anchor first. Raises Rejected for what the cluster cannot give."""
    made = [_anchor(work), _secret(work)]
    for service in work.processes:
        spec = pods.pod(service, work, cluster, shared.image, shared.log_level)
        made += _storage(service, work, cluster.storage)
        made.append(_workload(service, work, cluster, spec, around))
        made += _service(service, work)
        if service in ("actor", "generator"):
            made.append(_disruption(service, work, around))
        if _scaled_by_keda(service, cluster, around):
            made += scaled_object(service, work, cluster)
    if cluster.network_policy:
        made += _policies(work, cluster)
    labels = common_labels(cluster.release) | {JOB_LABEL: work.unit, SITE_LABEL: work.site, PROJECT_LABEL: work.project}
    for number, manifest in enumerate(made):
        owner = around.owner if number == 0 else around.anchor
        _finish(manifest, cluster.namespace, labels, owner)
    return made


def common_labels(release: str) -> dict[str, str]:
    """What tells the launcher's objects from others. The chart's policies let pods in by the first two."""
    return {
        "app.kubernetes.io/name": "longshore",
        "app.kubernetes.io/instance": release,
        "app.kubernetes.io/managed-by": MANAGER,
    }


def spec_hash(manifest: Manifest) -> str:
    """Of a manifest without its own annotation of it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _finish(manifest: Manifest, namespace: str, labels: dict[str, str], owner: Manifest | None) -> None:
    meta = manifest["metadata"]
    meta["namespace"] = namespace
    meta["labels"] = labels | meta.get("labels", {})
    for template in _templates(manifest["spec"]) if "spec" in manifest else ():
        template["metadata"]["labels"] = labels | template["metadata"]["labels"]
    if owner is not None:
        meta["ownerReferences"] = [owner]
    meta.setdefault("annotations", {})[HASH_ANNOTATION] = spec_hash(manifest)


def _templates(spec: Manifest) -> list[Manifest]:
    """Of the pods that a workload makes."""
    if "replicatedJobs" in spec:
        return [job["template"]["spec"]["template"] for job in spec["replicatedJobs"]]
    return [spec["template"]] if "template" in spec else []


def _selector(service: str, work: SiteWork) -> dict[str, str]:
    return {JOB_LABEL: work.unit, SITE_LABEL: work.site, "app.kubernetes.io/component": service}


def _anchor(work: SiteWork) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": work.base, "labels": {"app.kubernetes.io/component": "job"}},
        "data": {"job.json": work.texts.job_json},
    }


def _secret(work: SiteWork) -> Manifest:
    data = {"openai.keys": work.texts.openai_keys}
    for specs in work.processes.values():
        data |= pods.secret_settings(specs[0])
    password = urlsplit(data.get("longshore_broker_url", "")).password or ""
    # KEDA wants it by itself.
    data["broker_password"] = password
    if "broker" in work.processes:
        data["broker.conf"] = _broker_conf(password)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": work.base, "labels": {"app.kubernetes.io/component": "job"}},
        "type": "Opaque",
        "stringData": data,
    }


def _broker_conf(password: str) -> str:
    options = {
        "requirepass": password,
        "dir": "/data",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "auto-aof-rewrite-min-size": "512mb",
        "rdbcompression": "no",
        "maxmemory-policy": "noeviction",
        # The password is the access control.
        "protected-mode": "no",
    }
    return "".join(f"{name} {value}\n" for name, value in options.items())


def _workload(service: Service, work: SiteWork, cluster: ClusterSettings, spec: Manifest, around: Around) -> Manifest:
    if service == "learner":
        return _learner(work, spec, around)
    labels = _selector(service, work)
    meta: Manifest = {"labels": labels, "annotations": _scraped(service)}
    workload: Manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{work.base}-{service}", "labels": labels},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": meta, "spec": spec}},
    }
    if service in ("broker", "relay"):
        # One at a time: it alone holds the site's lease, and its volume.
        workload["kind"] = "StatefulSet"
        workload["spec"]["serviceName"] = f"{work.base}-{service}"
    if not _scaled_by_keda(service, cluster, around):
        workload["spec"]["replicas"] = around.replicas.get(service, len(work.processes[service]))
    return workload


def _scaled_by_keda(service: Service, cluster: ClusterSettings, around: Around) -> bool:
    return KEDA in around.kinds and keda_scales(service, cluster)


def _learner(work: SiteWork, spec: Manifest, around: Around) -> Manifest:
    labels = _selector("learner", work)
    template = {
        "metadata": {"labels": labels, "annotations": _scraped("learner")},
        "spec": {**spec, "restartPolicy": "OnFailure"},
    }
    job: Manifest = {"backoffLimit": _BACKOFF_LIMIT, "completions": 1, "parallelism": 1, "template": template}
    meta: Manifest = {"name": f"{work.base}-learner", "labels": labels}
    if _JOBSET not in around.kinds:
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": job}
    replicated = {"name": "learner", "replicas": 1, "template": {"metadata": {"labels": labels}, "spec": job}}
    return {
        "apiVersion": _JOBSET,
        "kind": "JobSet",
        "metadata": meta,
        "spec": {"failurePolicy": {"maxRestarts": 0}, "replicatedJobs": [replicated]},
    }


def _scraped(service: str) -> dict[str, str]:
    return {} if service == "broker" else {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT)}


def _service(service: Service, work: SiteWork) -> list[Manifest]:
    """By what a service's pods are found; of several a client sees each."""
    # An applied port is told from others by its protocol too, which older API servers do not add by themselves.
    ports: dict[str, list[dict[str, Any]]] = {
        "generator": [
            {"name": "grpc", "port": GRPC_PORT, "protocol": "TCP"},
            {"name": "openai", "port": OPENAI_PORT, "protocol": "TCP"},
        ],
        "verifier": [{"name": "grpc", "port": GRPC_PORT, "protocol": "TCP"}],
        "relay": [{"name": "grpc", "port": GRPC_PORT, "protocol": "TCP"}],
        "broker": [{"name": "redis", "port": BROKER_PORT, "protocol": "TCP"}],
    }
    if service not in ports:
        return []
    labels = _selector(service, work)
    spec = {"clusterIP": "None", "selector": labels, "ports": ports[service]}
    meta = {"name": f"{work.base}-{service}", "labels": labels}
    return [{"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}]


def _disruption(service: Service, work: SiteWork, around: Around) -> Manifest:
    """A drained node takes one pod of a service at a time."""
    version = "policy/v1" if "policy/v1" in around.kinds else "policy/v1beta1"
    labels = _selector(service, work)
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    meta = {"name": f"{work.base}-{service}", "labels": labels}
    return {"apiVersion": version, "kind": "PodDisruptionBudget", "metadata": meta, "spec": spec}


def _storage(service: Service, work: SiteWork, storage: StorageSettings | None) -> list[Manifest]:
    if storage is None or service not in ("broker", "relay"):
        return []
    spec: Manifest = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage.size}}}
    if storage.storage_class:
        spec["storageClassName"] = storage.storage_class
    meta = {"name": f"{work.base}-{service}", "labels": _selector(service, work)}
    return [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec}]


def _policies(work: SiteWork, cluster: ClusterSettings) -> list[Manifest]:
    """Who may reach a job's pods: those of the job. Whom they may ask: each other, the release, and the name service;
    a verifier, which runs what a model wrote, the name service alone."""
    job = {JOB_LABEL: work.unit, SITE_LABEL: work.site}
    labels = {"app.kubernetes.io/component": "network"}
    release = common_labels(cluster.release)
    release.pop("app.kubernetes.io/managed-by")
    names = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    inside = {"to": [{"podSelector": {"matchLabels": release}}]}
    closed = [service for service in work.processes if service not in cluster.open_egress and service != "verifier"]

    def policy(name: str, spec: Manifest) -> Manifest:
        meta = {"name": f"{work.base}-{name}", "labels": labels}
        return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}

    def services(names: Sequence[Service]) -> Manifest:
        expression = {"key": "app.kubernetes.io/component", "operator": "In", "values": list(names)}
        return {"matchLabels": job, "matchExpressions": [expression]}

    metrics = {"ports": [{"port": METRICS_PORT, "protocol": "TCP"}]}
    ingress = [{"from": [{"podSelector": {"matchLabels": job}}]}, metrics]
    made = [policy("in", {"podSelector": {"matchLabels": job}, "policyTypes": ["Ingress"], "ingress": ingress})]
    if closed:
        spec = {"podSelector": services(closed), "policyTypes": ["Egress"], "egress": [inside, names]}
        made.append(policy("out", spec))
    if "verifier" in work.processes:
        spec = {"podSelector": services(["verifier"]), "policyTypes": ["Egress"], "egress": [names]}
        made.append(policy("verifier", spec))
    return made
