"""Prometheus metrics of the Kubernetes launcher."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

UP = Gauge("longshore_launcher_cluster_up", "Whether a cluster answered at the last look", ["cluster"])
ACTS = Counter("longshore_launcher_acts_total", "Objects applied and deleted", ["cluster", "act", "kind"])
LOOK_SECONDS = Histogram("longshore_launcher_look_seconds", "Time of a look at a cluster, with its acts", ["cluster"])
PODS_WANTED = Gauge("longshore_launcher_pods_wanted", "Pods that scaling asks for", ["cluster", "service", "job"])
