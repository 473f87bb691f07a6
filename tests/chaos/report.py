"""The table and the JSON that a run leaves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from chaos.faults import Outcome
from chaos.proof import Evidence, surviving


@dataclass(frozen=True)
class Row:
    """All faults of one kind on one target. Times in seconds; None: not one of them was seen to end."""

    target: str
    kind: str
    times: int
    ready_median: float | None
    ready_max: float | None
    step_median: float | None
    step_max: float | None


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row for each target and kind, by target."""
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.fault.target, outcome.fault.kind.value), []).append(outcome)
    return [_row(target, kind, found) for (target, kind), found in sorted(grouped.items())]


def _row(target: str, kind: str, outcomes: Sequence[Outcome]) -> Row:
    ready = [outcome.ready_s for outcome in outcomes if outcome.ready_s is not None]
    step = [outcome.step_s for outcome in outcomes if outcome.step_s is not None]
    return Row(target, kind, len(outcomes), *_median_and_max(ready), *_median_and_max(step))


def _median_and_max(values: Sequence[float]) -> tuple[float | None, float | None]:
    return (round(statistics.median(values), 1), round(max(values), 1)) if values else (None, None)


def table(found: Sequence[Row]) -> str:
    """Markdown, as in docs/failures.md."""
    lines = [
        "| target | fault | times | ready again, s (median, max) | next new train step, s (median, max) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.target} | {row.kind} | {row.times} | {_pair(row.ready_median, row.ready_max)} "
        f"| {_pair(row.step_median, row.step_max)} |"
        for row in found
    ]
    return "\n".join(lines)


def _pair(median: float | None, most: float | None) -> str:
    return "-" if median is None or most is None else f"{median:.1f}, {most:.1f}"


def facts(job_id: str, evidence: Evidence) -> dict[str, object]:
    """What happened to one job, in numbers."""
    history, learner = evidence.home.history, evidence.learner
    uses = [key for record in surviving(learner.records).values() for key in record.uses]
    replayed = sum(1 for record in learner.records) - len(surviving(learner.records))
    rewards = [value for _, value in evidence.rewards]
    return {
        "job": job_id,
        "state": evidence.state,
        "tickets_issued": len(history.issued),
        "rollouts_in_surviving_batches": len(uses),
        "rollouts_in_more_than_one": len(uses) - len(set(uses)),
        "outcomes": dict(sorted(_counted(learner.ends).items())),
        "attempts": history.attempts,
        "attempts_redone": history.attempts - len(history.issued),
        "leases_taken_over": history.take_overs,
        "given_back": history.given_back,
        "delivered_again": sum(len(found) for found in history.deliveries.values()) - len(history.deliveries),
        "made_again_after_delivery": sum(
            len({item.digest for item in found}) > 1 for found in history.deliveries.values()
        ),
        "issued_again_after_a_lost_tail": sum(history.issued.values()) - len(history.issued),
        "train_steps": len(surviving(learner.records)),
        "train_steps_replayed": replayed,
        "learner_epochs": len({record.epoch for record in learner.records}),
        "checkpoints_seen": len(learner.checkpoints),
        "versions_seen": len(learner.versions),
        "equation_checked_after_acts": history.checks,
        "equation_read_from_the_ledger": evidence.readings,
        "reward_first": round(sum(rewards[:5]) / max(1, len(rewards[:5])), 3),
        "reward_last": round(sum(rewards[-max(1, len(rewards) // 10) :]) / max(1, len(rewards) // 10), 3),
        "eval_before": evidence.summary.get("eval_before"),
        "eval_after": evidence.summary.get("eval_after"),
        "seconds": evidence.summary.get("seconds"),
    }


def _counted(ends: dict[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for outcome in ends.values():
        found[outcome] = found.get(outcome, 0) + 1
    return found


def as_json(found: Sequence[Row]) -> list[dict[str, object]]:
    return [asdict(row) for row in found]
