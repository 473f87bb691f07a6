"""Scaling by KEDA where a cluster has it: https://keda.sh/docs/latest/scalers/redis-streams/. Pure.

Actors follow the tickets of their site's broker: those that nobody has yet (the consumer group's lag) and those that
are being worked on (its pending entries), as many a pod as an actor works on at a time. Generators follow the same,
as many a pod as it has slots.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from longshore.launcher.kubernetes.cluster_settings import ClusterSettings, Service
from longshore.launcher.kubernetes.wanted import Manifest, SiteWork
from longshore.rollout_queue.keys import ACTORS, JobKeys
from longshore.types import JobRef

KEDA = "keda.sh/v1alpha1"
# Down again only after tickets have been few for this long: a pod's start costs more than its idling.
COOLDOWN_S = 300


def keda_scales(service: Service, cluster: ClusterSettings) -> bool:
    """Whether a service is one that is scaled, and shall be."""
    return service in ("actor", "generator") and cluster.of(service).scale is not None


def scaled_object(service: Service, work: SiteWork, cluster: ClusterSettings) -> list[Manifest]:
    """A ScaledObject, and how it logs in at the broker; empty for a broker that KEDA could not reach."""
    scale = cluster.of(service).scale
    url = urlsplit(work.processes["actor"][0].env["LONGSHORE_BROKER_URL"] if "actor" in work.processes else "")
    if scale is None or url.scheme not in ("redis", "rediss") or url.hostname is None:
        return []
    resources = work.spec.resources_at(work.site)
    each = resources.rollouts_per_actor if service == "actor" else resources.generator_slots
    name = f"{work.base}-{service}"
    common = {
        "address": f"{url.hostname}:{url.port or 6379}",
        "stream": JobKeys(JobRef(work.project, work.unit), work.site).tickets,
        "consumerGroup": ACTORS,
        "databaseIndex": url.path.strip("/") or "0",
        "enableTLS": "true" if url.scheme == "rediss" else "false",
        "username": url.username or "",
    }
    login = {"name": name}
    triggers = [
        {"type": "redis-streams", "metadata": {**common, **counted}, "authenticationRef": login}
        for counted in ({"lagCount": str(each), "activationLagCount": "0"}, {"pendingEntriesCount": str(each)})
    ]
    behavior = {"scaleDown": {"stabilizationWindowSeconds": COOLDOWN_S}}
    labels = {"app.kubernetes.io/component": service}
    password = {"parameter": "password", "name": work.base, "key": "broker_password"}
    return [
        {
            "apiVersion": KEDA,
            "kind": "TriggerAuthentication",
            "metadata": {"name": name, "labels": labels},
            "spec": {"secretTargetRef": [password]},
        },
        {
            "apiVersion": KEDA,
            "kind": "ScaledObject",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "scaleTargetRef": {"name": name},
                "minReplicaCount": scale.min,
                "maxReplicaCount": scale.max,
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
                "triggers": triggers,
            },
        },
    ]
