"""What an actor counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_JOB = ("project", "job", "site")

ROLLOUTS = Counter("longshore_actor_rollouts_total", "Attempts by how they ended", (*_JOB, "outcome"))
RUNNING = Gauge("longshore_actor_running_rollouts", "Attempts in progress", _JOB)
SECONDS = Histogram(
    "longshore_actor_rollout_seconds",
    "Time from a claim to its delivery",
    _JOB,
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600, 10800, 86400),
)
TOKENS = Counter("longshore_actor_sampled_tokens_total", "Sampled tokens of finished rollouts", _JOB)
RETRIES = Counter("longshore_actor_retries_total", "Calls repeated because a peer was away", (*_JOB, "peer"))
