"""What a job has done so far, apart from weights and ledger: the small part of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from longshore.learner.intervals import Interval
from longshore.learner.paired import Paired, paired

# Evaluations that a checkpoint and a summary hold; of more, the oldest are left out.
REMEMBERED_EVALUATIONS = 1000


@dataclass(frozen=True)
class Evaluating:
    """An evaluation under way. Example: Evaluating("step", step=40, version=41)"""

    # before, step or after
    when: str
    # Train steps that its version has behind it.
    step: int
    version: int


@dataclass(frozen=True)
class Evaluation:
    """What came of one."""

    when: str
    step: int
    version: int
    # Held-out tasks, and those of them that a scored rollout came of.
    tasks: int
    scored: int
    # None: nothing came.
    interval: Interval | None

    def metrics(self) -> dict[str, float]:
        """For the line of a train step."""
        found = {"eval/step": float(self.step), "eval/version": float(self.version), "eval/scored": float(self.scored)}
        if self.interval is not None:
            found |= {"eval/reward": self.interval.mean, "eval/low": self.interval.low, "eval/high": self.interval.high}
        return found


@dataclass
class Progress:
    """Counters of one job; JSON-compatible through `state` and `restore`."""

    step: int = 0
    version: int = 0
    # Ordinal of the next training task in the source.
    cursor: int = 0
    # Id of the newest wish to attempt a dead letter again that was fulfilled; "": none.
    newest_wish: str = ""
    # Unix seconds of the first incarnation's start.
    started_at: float = 0.0
    # "before" and "after" -> mean reward on held-out tasks.
    evaluations: dict[str, float] = field(default_factory=dict)
    # Every evaluation, in the order in which they ended.
    results: list[Evaluation] = field(default_factory=list)
    # Those under way, in the order in which they were begun.
    evaluating: list[Evaluating] = field(default_factory=list)
    # The same two, task by task in the order of the held-out tasks; None: no rollout came of it.
    heldout_rewards: dict[str, list[float | None]] = field(default_factory=dict)
    # Over the rollouts of all batches.
    staleness_sum: int = 0
    staleness_count: int = 0
    staleness_max: int = 0

    @property
    def staleness_mean(self) -> float | None:
        return self.staleness_sum / self.staleness_count if self.staleness_count else None

    @property
    def evaluated_step(self) -> int:
        """The train step whose version was evaluated last, or is being evaluated; 0: none."""
        steps = [result.step for result in self.results] + [running.step for running in self.evaluating]
        return max(steps, default=0)

    def add_evaluation(self, result: Evaluation, rewards: list[float | None]) -> None:
        """Notes what came of an evaluation; `rewards` has one a held-out task, None where no rollout came of it."""
        self.results.append(result)
        del self.results[:-REMEMBERED_EVALUATIONS]
        if result.when != "step":
            self.heldout_rewards[result.when] = rewards
            self.evaluations[result.when] = 0.0 if result.interval is None else result.interval.mean

    @property
    def paired(self) -> Paired | None:
        """The held-out tasks before against after; None unless there were both evaluations."""
        before, after = (self.heldout_rewards.get(when) for when in ("before", "after"))
        return None if before is None or after is None else paired(before, after)

    def add_staleness(self, values: list[int]) -> None:
        self.staleness_sum += sum(values)
        self.staleness_count += len(values)
        self.staleness_max = max([self.staleness_max, *values])

    def state(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def restore(state: dict[str, Any]) -> Progress:
        """The progress that `state` was taken of."""
        return Progress(
            **{
                **state,
                "results": [_result(item) for item in state.get("results", [])],
                "evaluating": [Evaluating(**item) for item in state.get("evaluating", [])],
            }
        )


def _result(item: dict[str, Any]) -> Evaluation:
    interval = item["interval"]
    return Evaluation(**{**item, "interval": None if interval is None else Interval(**interval)})
