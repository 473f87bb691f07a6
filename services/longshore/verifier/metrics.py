"""What a verifier counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_JOB = ("project", "job")

SCORES = Counter("longshore_verifier_scores_total", "Scores by how they ended", (*_JOB, "outcome"))
SECONDS = Histogram(
    "longshore_verifier_score_seconds",
    "Time from a request to its verdict, waiting included",
    _JOB,
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
WAITING = Gauge("longshore_verifier_waiting_scores", "Scores that no worker has taken yet", _JOB)
RESTARTS = Counter("longshore_verifier_worker_restarts_total", "Scoring processes that were replaced", _JOB)
