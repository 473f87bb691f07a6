"""A job's states, the moves between them, and what of its events is worth a place in the job's row. Pure."""

from __future__ import annotations

import enum

Body = dict[str, object]


class JobState(enum.Enum):
    """queued -> starting -> running -> (cancelling) -> succeeded | failed | cancelled; pausing -> paused -> queued"""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    # Its processes are being stopped; a later resume goes on from its newest checkpoint.
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return not MOVES[self]

    @property
    def active(self) -> bool:
        """Whether something has to be done about the job."""
        return not self.ended and self is not JobState.PAUSED


# From -> to. A short job may succeed before all of its processes were seen ready, and a cancel or a pause may come too
# late: then the job has ended as it has.
MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.PAUSING, JobState.CANCELLING, JobState.FAILED}),
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.PAUSING, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.PAUSING: frozenset({JobState.PAUSED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLING}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


def sources_of(target: JobState) -> list[JobState]:
    """The states from which a job may move to `target`."""
    return [state for state, targets in MOVES.items() if target in targets]


# Types that a learner may write; "state" and "process" are the gateway's own.
LEARNER_EVENTS = frozenset({"phase", "warm_start", "evaluation", "step", "warning", "summary"})
_STEP_KEYS = (
    "reward/mean",
    "policy_version",
    "off_policy/mean",
    "perf/tokens_per_s",
    "time/remaining",
    "tickets/issued",
)


def progress_after(progress: Body, kind: str, body: Body) -> Body:
    """The job's progress once an event is known. Example: {"phase": "train", "step": 12, "steps": 400, ...}"""
    if kind == "phase":
        return {**progress, "phase": body.get("phase")}
    if kind == "step":
        metrics = body.get("metrics")
        shown = {key: metrics[key] for key in _STEP_KEYS if key in metrics} if isinstance(metrics, dict) else {}
        return {**progress, "step": body.get("step"), "steps": body.get("steps"), **shown}
    if kind == "evaluation" and body.get("reward") is not None:
        return {**progress, f"eval_{body.get('when')}": body["reward"]}
    if kind == "summary":
        summary = body.get("summary")
        return {**progress, "outcome": summary.get("state")} if isinstance(summary, dict) else progress
    return progress
