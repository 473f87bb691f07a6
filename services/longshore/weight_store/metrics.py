"""What the weight store counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from longshore.types import JobRef

PUBLISHES = Counter(
    "longshore_weights_publishes_total",
    "Publishes by result: published, existed, fenced, conflict, refused, failed",
    ["project", "job", "result"],
)
PUBLISH_SECONDS = Histogram(
    "longshore_weights_publish_seconds",
    "Checking and storing a payload that was received",
    ["project", "job"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
RECEIVED_BYTES = Counter("longshore_weights_received_bytes_total", "Payload bytes received", ["project", "job"])
SENT_BYTES = Counter("longshore_weights_sent_bytes_total", "Payload and asset bytes sent", ["project", "job"])
PUSHED_BYTES = Counter(
    "longshore_weights_pushed_bytes_total", "Payload bytes sent to watchers before they asked", ["project", "job"]
)
HEAD_VERSION = Gauge("longshore_weights_head_version", "Version that `head` names", ["project", "job"])
WATCHERS = Gauge("longshore_weights_watchers", "Open Watch streams", ["project", "job"])
REMOVED_OBJECTS = Counter(
    "longshore_weights_removed_objects_total", "Objects that retention removed", ["project", "job"]
)
FAULTS = Counter(
    "longshore_weights_faults_total",
    "What a reader could not use: a push or delta, asked for again in another way, or a pointer, passed over",
    ["project", "job", "what"],
)
RETENTION_FAILURES = Counter("longshore_weights_retention_failures_total", "Retention runs that failed")
BACKGROUND_ENCODINGS = Counter(
    "longshore_weights_background_encodings_total",
    "Encodings (full, delta, merged) by what became of them: made, not_smaller, no_memory, or why they failed",
    ["project", "job", "kind", "result"],
)
BACKGROUND_BYTES = Counter(
    "longshore_weights_background_bytes_total", "Bytes of encodings made in the background", ["project", "job", "kind"]
)
PATHS = Counter(
    "longshore_weights_paths_total",
    "Ways to a version that were planned: nothing, delta, merged, adapter, deltas, full, anchored, unreachable",
    ["project", "job", "kind"],
)
HOST_COPY_BYTES = Gauge("longshore_weights_host_copy_bytes", "Tensors that are held as host copies")
DAMAGED_ENCODINGS = Counter(
    "longshore_weights_damaged_encodings_total", "Encodings whose bytes were found gone or wrong", ["project", "job"]
)


def fault(job: JobRef, what: str) -> None:
    """Counts what could not be used: push, delta, pointer."""
    FAULTS.labels(job.project, job.job, what).inc()
