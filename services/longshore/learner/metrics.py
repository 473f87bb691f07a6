"""Prometheus metrics of the learner."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

LABELS = ("project", "job")

TRAIN_STEP = Gauge("longshore_learner_train_step", "Optimizer steps taken", LABELS)
POLICY_VERSION = Gauge("longshore_learner_policy_version", "Newest version handed to the weight store", LABELS)
REWARD_MEAN = Gauge("longshore_learner_reward_mean", "Mean reward of the last batch", LABELS)
STALENESS = Gauge("longshore_learner_staleness_versions", "Mean staleness of the last batch, in versions", LABELS)
STEP_SECONDS = Histogram(
    "longshore_learner_step_seconds",
    "Forward, backward and optimizer step",
    LABELS,
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
)
WAIT_SECONDS = Counter("longshore_learner_wait_for_batch_seconds_total", "Time without a batch to train on", LABELS)
TOKENS = Counter("longshore_learner_sampled_tokens_total", "Sampled tokens of consumed rollouts", LABELS)
TICKETS = Gauge(
    "longshore_learner_tickets_ended", "Tickets by how they ended; a restart resumes the counts", (*LABELS, "outcome")
)
IN_FLIGHT = Gauge("longshore_learner_tickets_in_flight", "Tickets issued and not ended", LABELS)
IMBALANCE = Gauge(
    "longshore_learner_ledger_imbalance",
    "Tickets in no state or in two: issued - sum of the states (books=broker), and the broker's issued - the "
    "learner's (books=learner). Anything but 0 is a fault",
    (*LABELS, "books"),
)
REPEATS = Counter("longshore_learner_repeated_deliveries_total", "Deliveries of tickets that had ended", LABELS)
REJECTED = Counter(
    "longshore_learner_rejected_deliveries_total", "Deliveries set aside, by reason", (*LABELS, "reason")
)
AWAITING = Gauge("longshore_learner_rollouts_awaiting_verdict", "Rollouts at home that await their verdict", LABELS)
LATE = Counter("longshore_learner_late_members_total", "Rollouts whose verdict came after their group's step", LABELS)
PASSED_OVER = Counter(
    "longshore_learner_groups_passed_over_total", "Groups of equal rewards in whose place others were issued", LABELS
)
SPOILT = Counter(
    "longshore_learner_steps_not_finite_total", "Train steps not taken because their gradient was no number", LABELS
)
UNACKNOWLEDGED = Gauge(
    "longshore_learner_unacknowledged_bytes",
    "Rollouts trained on or accounted that no durable checkpoint contains",
    LABELS,
)
EVALUATION = Gauge(
    "longshore_learner_evaluation",
    "The last evaluation: train steps behind its version, the version, scored tasks, mean reward and its 95 % bounds",
    (*LABELS, "what"),
)
RECONCILED = Counter("longshore_learner_reconciliations_total", "Times the broker's counts were made anew", LABELS)


def observe_evaluation(labels: tuple[str, str], told: Mapping[str, float]) -> None:
    """Shows what came of an evaluation, by the names of a step's line without `eval/`."""
    for name, value in told.items():
        EVALUATION.labels(*labels, name.removeprefix("eval/")).set(value)
