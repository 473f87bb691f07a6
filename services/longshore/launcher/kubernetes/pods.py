"""A pod of one service of a job: restricted, without a token of its cluster, told by files what is secret. Pure."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from longshore.errors import Rejected
from longshore.launcher.kubernetes.cluster_settings import (
    ClusterSettings,
    ImageSettings,
    Resources,
    Service,
    default_resources,
)
from longshore.launcher.kubernetes.wanted import BROKER_PORT, GRPC_PORT, METRICS_PORT, OPENAI_PORT, Manifest, SiteWork
from longshore.launcher.ports import LOOPBACK
from longshore.launcher.spec import ProcessSpec

USER = 10001
BROKER_USER = 999
_SECRETS, _TLS, _JOB = "/run/secrets/longshore", "/run/secrets/tls", "/etc/longshore"
_SITE = "/run/secrets/site"
_FILES = "/var/lib/longshore/data"
_SPOOL, _WEIGHTS = "/var/lib/longshore/spool", "/var/lib/longshore/weights"
_PEER = re.compile(re.escape(LOOPBACK) + r":\$\{PORT:([A-Za-z0-9_.-]+)\.grpc\}")
# Told by files: the environment of a pod is shown to whoever may look at pods.
SECRET_SETTINGS = ("LONGSHORE_BROKER_URL", "LONGSHORE_HOME_BROKER_URL")
# What a laptop's plan says of its one disk and its ports, and a pod has elsewhere or not at all.
_LEFT_OUT = {*SECRET_SETTINGS, "LONGSHORE_NAME", "LONGSHORE_OPENAI_URL_FILE"}
# Time to write a checkpoint, or to hand over what is finished.
GRACE_S = 60
DRAIN_S = 20
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod(service: Service, work: SiteWork, cluster: ClusterSettings, images: ImageSettings, log_level: str) -> Manifest:
    """The PodSpec of a service's pods. Raises Rejected for a job that wants GPUs of a cluster without."""
    gpus = _gpus(service, work, cluster)
    own = cluster.of(service)
    spec: Manifest = {
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": _user(BROKER_USER if service == "broker" else USER),
        "nodeSelector": {**own.node_selector, **(cluster.gpu.node_selector if gpus and cluster.gpu else {})},
        "tolerations": [*own.tolerations, *(cluster.gpu.tolerations if gpus and cluster.gpu else ())],
        "priorityClassName": cluster.priority_class_name,
        "runtimeClassName": own.runtime_class_name,
        "imagePullSecrets": [{"name": name} for name in cluster.image_pull_secrets],
    }
    if service == "learner" and cluster.learner_beside_home:
        spec["affinity"] = {"podAffinity": _beside_home(cluster)}
    spec = {key: value for key, value in spec.items() if value not in ({}, [], "")}
    if service == "broker":
        return {**spec, "containers": [_broker(cluster, images)], "volumes": _broker_volumes(work, cluster)}
    suffix = cluster.gpu.image_suffix if gpus and cluster.gpu else ""
    container: Manifest = {
        "name": service,
        "image": f"{images.prefix}-{service}{suffix}:{images.tag}",
        "imagePullPolicy": images.pull_policy,
        "args": ["serve"],
        "env": _environment(service, work, cluster, log_level),
        "ports": _ports(service),
        **_probes(),
        "securityContext": CONTAINER_SECURITY,
        "resources": _resources(own.resources or default_resources(service), gpus, cluster),
        "volumeMounts": _mounts(service, work, cluster),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if cluster.object_store_secret and service in ("actor", "learner", "relay"):
        container["envFrom"] = [{"secretRef": {"name": cluster.object_store_secret}}]
    return {**spec, "containers": [container], "volumes": _volumes(service, work, cluster)}


def settings(service: Service, work: SiteWork, cluster: ClusterSettings) -> dict[str, str]:
    """The plan's settings of a service as they are in a pod; names and what is secret left out."""
    spec = work.processes[service][0]
    told = {name: value for name, value in spec.env.items() if name not in _LEFT_OUT}
    moved = {
        "LONGSHORE_LISTEN": f"0.0.0.0:{GRPC_PORT}",
        "LONGSHORE_METRICS_LISTEN": f"0.0.0.0:{METRICS_PORT}",
        "LONGSHORE_OPENAI_LISTEN": f"0.0.0.0:{OPENAI_PORT}",
        "LONGSHORE_OPENAI_KEYS_FILE": f"{_SECRETS}/openai.keys",
        "LONGSHORE_JOB_FILE": f"{_JOB}/job.json",
        "LONGSHORE_SPOOL_DIR": _SPOOL,
        "LONGSHORE_WEIGHTS_DIR": _WEIGHTS,
        "LONGSHORE_BLOBS_URL": _blobs(cluster.blobs_url, work),
        "LONGSHORE_HOME_BLOBS_URL": _blobs(cluster.home_blobs_url, work),
        "LONGSHORE_HOME_WEIGHTS": cluster.home_weights,
    }
    told |= {name: value for name, value in moved.items() if name in told}
    if "LONGSHORE_OPENAI_LISTEN" in told:
        told |= {"LONGSHORE_OPENAI_TLS_CERT": f"{_TLS}/tls.crt", "LONGSHORE_OPENAI_TLS_KEY": f"{_TLS}/tls.key"}
    if service == "relay" and cluster.site_secret:
        told.pop("LONGSHORE_HOME_WEIGHTS", None)
        told["LONGSHORE_SITE_FILE"] = f"{_SITE}/site.json"
    told = {name: _addresses(value, work, cluster) for name, value in told.items()}
    return told | cluster.of(service).env


def secret_settings(spec: ProcessSpec) -> dict[str, str]:
    """What of a process's settings goes into its job's Secret, by the names of the files."""
    return {name.lower(): spec.env[name] for name in SECRET_SETTINGS[:1] if name in spec.env}


def _addresses(value: str, work: SiteWork, cluster: ClusterSettings) -> str:
    """Peers by the names of their Services; of several that share one it stands once. Files of addresses go."""
    if "${PORT:" not in value:
        return value
    entries = [_PEER.sub(lambda found: _address(found[1], work, cluster), entry) for entry in value.split(",")]
    return ",".join(dict.fromkeys(entry for entry in entries if not entry.startswith("file:")))


def _address(process: str, work: SiteWork, cluster: ClusterSettings) -> str:
    service = work.service_of(process)
    if service is None:
        raise Rejected("service", f"{process} is no process of site {work.site}")
    return f"{work.base}-{service}.{cluster.namespace}.svc:{GRPC_PORT}"


def _blobs(url: str, work: SiteWork) -> str:
    return f"{url.rstrip('/')}/{work.unit}" if url else ""


def _environment(service: Service, work: SiteWork, cluster: ClusterSettings, log_level: str) -> list[Manifest]:
    fixed = {
        "LONGSHORE_LOG_LEVEL": log_level,
        "LONGSHORE_SECRETS_DIR": _SECRETS,
        "LONGSHORE_TLS_CERT": f"{_TLS}/tls.crt",
        "LONGSHORE_TLS_KEY": f"{_TLS}/tls.key",
        "LONGSHORE_TLS_CA": f"{_TLS}/ca.crt",
        "LONGSHORE_DRAIN_S": str(DRAIN_S),
    }
    values = {**fixed, **settings(service, work, cluster)}
    named = {"name": "LONGSHORE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    return [named, *({"name": name, "value": value} for name, value in sorted(values.items()))]


def _gpus(service: Service, work: SiteWork, cluster: ClusterSettings) -> int:
    spec = work.spec
    wanted = {
        "learner": spec.train.processes if spec.train.compute.device == "cuda" else 0,
        # Over vLLM; a cluster that says nothing of GPUs has the engine's build for CPUs.
        "generator": spec.generator.tensor_parallel if spec.generator.engine == "vllm" and cluster.gpu else 0,
    }.get(service, 0)
    if wanted and cluster.gpu is None:
        raise Rejected("gpu", f"the learner wants {wanted} GPUs, and clusters.{work.site}.gpu is not set")
    return wanted


def _resources(given: Resources, gpus: int, cluster: ClusterSettings) -> Manifest:
    limits: dict[str, str | int] = dict(given.limits)
    if gpus and cluster.gpu is not None:
        limits[cluster.gpu.resource] = gpus
    return {"requests": dict(given.requests), "limits": limits}


def _user(user: int) -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _beside_home(cluster: ClusterSettings) -> Manifest:
    home = {
        "app.kubernetes.io/name": "longshore",
        "app.kubernetes.io/instance": cluster.release,
        "app.kubernetes.io/component": "home",
    }
    term = {"labelSelector": {"matchLabels": home}, "topologyKey": "kubernetes.io/hostname"}
    return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}


def _ports(service: Service) -> list[Manifest]:
    ports = [
        {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
        {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
    ]
    return (
        [*ports, {"name": "openai", "containerPort": OPENAI_PORT, "protocol": "TCP"}]
        if service == "generator"
        else ports
    )


def _probes() -> Manifest:
    """A page, so that no process is started to ask; kubelet's own gRPC probe knows no TLS."""
    check = {"httpGet": {"path": "/healthz", "port": "metrics"}, "timeoutSeconds": 10}
    return {
        "startupProbe": {**check, "periodSeconds": 2, "failureThreshold": 150},
        "readinessProbe": {**check, "periodSeconds": 10},
        "livenessProbe": {**check, "periodSeconds": 20, "failureThreshold": 6},
    }


def _mounts(service: Service, work: SiteWork, cluster: ClusterSettings) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "job", "mountPath": _JOB, "readOnly": True},
        {"name": "secrets", "mountPath": _SECRETS, "readOnly": True},
        {"name": "tls", "mountPath": _TLS, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
    ]
    if service in ("actor", "relay"):
        mounts.append({"name": "data", "mountPath": _SPOOL, "subPath": "spool"})
    if service == "relay":
        mounts.append({"name": "data", "mountPath": _WEIGHTS, "subPath": "weights"})
    if service == "relay" and cluster.site_secret:
        mounts.append({"name": "site", "mountPath": _SITE, "readOnly": True})
    if service == "learner":
        env = work.processes[service][0].env
        keys = str(PurePosixPath(env["LONGSHORE_SIGNING_KEY_FILE"]).parent)
        # Its own job's folders, as the gateway made them, and no other's.
        mounts += [
            {"name": "data", "mountPath": env["LONGSHORE_RUN_DIR"], "subPath": f"runs/{work.unit}"},
            {"name": "data", "mountPath": keys, "subPath": f"state/jobs/{work.unit}"},
        ]
    if _shares_memory(service, work):
        mounts.append({"name": "memory", "mountPath": "/dev/shm"})  # noqa: S108 - the pod's own
    if cluster.data_claim and service != "relay":
        mounts.append({"name": "files", "mountPath": _FILES, "readOnly": True})
    return mounts


def _volumes(service: Service, work: SiteWork, cluster: ClusterSettings) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "job", "configMap": {"name": work.base}},
        {"name": "tls", "secret": {"secretName": cluster.tls_secret, "defaultMode": 0o440}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}},
        _secrets(service, work, cluster),
    ]
    if service == "learner":
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": cluster.home_claim}})
    elif service == "relay" and cluster.storage is not None:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": f"{work.base}-relay"}})
    elif service in ("actor", "relay"):
        # An actor's outlives its containers, not its pod: then its tickets are attempted anew.
        volumes.append({"name": "data", "emptyDir": {"sizeLimit": "20Gi" if service == "relay" else "2Gi"}})
    if service == "relay" and cluster.site_secret:
        credential = {"key": "site.json", "path": "site.json"}
        secret = {"secretName": cluster.site_secret, "items": [credential], "defaultMode": 0o440}
        volumes.append({"name": "site", "secret": secret})
    if _shares_memory(service, work):
        volumes.append({"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}})
    if cluster.data_claim and service != "relay":
        claim = {"claimName": cluster.data_claim, "readOnly": True}
        volumes.append({"name": "files", "persistentVolumeClaim": claim})
    return volumes


def _shares_memory(service: Service, work: SiteWork) -> bool:
    """Whether its processes hand tensors to each other: a pod's own 64 MiB would not do."""
    if service == "learner":
        return work.spec.train.processes > 1
    return service == "generator" and work.spec.generator.engine == "vllm"


def _secrets(service: Service, work: SiteWork, cluster: ClusterSettings) -> Manifest:
    """A service sees what it needs: verifiers nothing, generators digests of keys."""
    keys = {"actor": ["longshore_broker_url"], "learner": ["longshore_broker_url"], "relay": ["longshore_broker_url"]}
    items = [{"key": key, "path": key} for key in keys.get(service, [])]
    if service == "generator":
        items = [{"key": "openai.keys", "path": "openai.keys"}]
    if not items:
        return {"name": "secrets", "emptyDir": {"sizeLimit": "1Mi"}}
    sources: list[Manifest] = [{"secret": {"name": work.base, "items": items}}]
    if service == "relay" and not cluster.site_secret:
        home = {"key": "longshore_home_broker_url", "path": "longshore_home_broker_url"}
        sources.append({"secret": {"name": cluster.home_broker_secret, "items": [home]}})
    return {"name": "secrets", "projected": {"defaultMode": 0o440, "sources": sources}}


def _broker(cluster: ClusterSettings, images: ImageSettings) -> dict[str, Any]:
    own = cluster.of("broker")
    return {
        "name": "broker",
        "image": images.broker,
        "imagePullPolicy": images.pull_policy,
        "command": ["valkey-server", "/run/secrets/broker/broker.conf"],
        "ports": [{"name": "redis", "containerPort": BROKER_PORT, "protocol": "TCP"}],
        "startupProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 2, "failureThreshold": 150},
        # While it reads its file back it answers that it is loading.
        "readinessProbe": {
            "exec": {"command": ["sh", "-c", "valkey-cli ping | grep -Eq 'PONG|NOAUTH'"]},
            "timeoutSeconds": 5,
        },
        "livenessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 20, "timeoutSeconds": 5},
        "securityContext": CONTAINER_SECURITY,
        "resources": _resources(own.resources or default_resources("broker"), 0, cluster),
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "conf", "mountPath": "/run/secrets/broker", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
        ],
    }


def _broker_volumes(work: SiteWork, cluster: ClusterSettings) -> list[Manifest]:
    data: Manifest = {"name": "data", "emptyDir": {"sizeLimit": "20Gi"}}
    if cluster.storage is not None:
        data = {"name": "data", "persistentVolumeClaim": {"claimName": f"{work.base}-broker"}}
    conf = {"secretName": work.base, "items": [{"key": "broker.conf", "path": "broker.conf"}], "defaultMode": 0o440}
    return [data, {"name": "conf", "secret": conf}, {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}]
