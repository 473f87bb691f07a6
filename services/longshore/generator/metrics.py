"""What a generator counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from longshore.generator.canary import Gap, demand, holds
from longshore.types import JobRef

_JOB = ("project", "job")

TOKENS = Counter("longshore_generator_tokens_total", "Tokens drawn", _JOB)
REPLIES = Counter("longshore_generator_replies_total", "Requests by how they ended", (*_JOB, "outcome"))
RUNNING = Gauge("longshore_generator_running_requests", "Requests that hold a slot", _JOB)
WAITING = Gauge("longshore_generator_waiting_requests", "Requests that wait for a slot or a version", _JOB)
VERSION = Gauge("longshore_generator_policy_version", "Policy version that is served", _JOB)
REFUSED = Counter("longshore_generator_refused_versions_total", "Attempts at a version that failed", (*_JOB, "reason"))
CANARY_GAP = Gauge(
    "longshore_generator_canary_gap_nats",
    "How far the log-probs of the version that was proven last are from the learner's",
    (*_JOB, "over"),
)
UNPROVEN = Counter("longshore_generator_unproven_versions_total", "Versions whose canary was off", _JOB)
PARKED = Counter("longshore_generator_parked_total", "Times that a running request gave its pages up", _JOB)
DECODE_SECONDS = Histogram(
    "longshore_generator_decode_step_seconds",
    "One decode step of all running requests",
    _JOB,
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
)
PREFILL_SECONDS = Histogram(
    "longshore_generator_prefill_seconds",
    "One prefill of the prompts admitted together",
    _JOB,
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
)
SWAP_SECONDS = Histogram(
    "longshore_generator_swap_seconds",
    "From news of a version to serving it: fetch, staging, proof, and waiting for requests that hold the old one",
    _JOB,
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)


class EngineMetrics:
    """The metrics that an engine itself moves, bound to its job."""

    def __init__(self, job: JobRef) -> None:
        labels = (job.project, job.job)
        self.tokens = TOKENS.labels(*labels)
        self.running = RUNNING.labels(*labels)
        self.waiting = WAITING.labels(*labels)
        self.version = VERSION.labels(*labels)
        self.parked = PARKED.labels(*labels)
        self.decode_seconds = DECODE_SECONDS.labels(*labels)
        self.prefill_seconds = PREFILL_SECONDS.labels(*labels)
        self._largest_gap, self._mean_gap = (CANARY_GAP.labels(*labels, over) for over in ("max", "mean"))
        self._unproven = UNPROVEN.labels(*labels)

    def prove(self, gap: Gap, dtype: str) -> None:
        """Notes what a canary gave. Raises IntegrityError where that is no proof, in an engine of this dtype."""
        self._largest_gap.set(gap.largest)
        self._mean_gap.set(gap.mean)
        if not holds(gap, dtype):
            self._unproven.inc()
        demand(gap, dtype)
