"""What the job knows of each task: how often attempts at it succeed. For curricula, replay, and whoever looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longshore.learner.credit.group import mean_of
from longshore.learner.groups import as_float, as_int, as_list

# Tasks that are remembered; of more, those that were attempted longest ago are forgotten.
REMEMBERED_TASKS = 16_384
# What a group's mean counts for beside the estimate so far: policies change, so it never becomes small.
NEWEST = 0.3
SOLVED, HOPELESS = 0.9, 0.1


@dataclass(frozen=True)
class Estimate:
    """Example: Estimate(success=0.4, groups=3)"""

    success: float
    groups: int

    def after(self, mean: float) -> Estimate:
        """With one more group's mean: the plain mean of the first groups, later ones weigh 0.3."""
        weight = max(NEWEST, 1.0 / (self.groups + 1))
        return Estimate(self.success + weight * (mean - self.success), self.groups + 1)


class TaskBook:
    """Estimates by task id, those attempted longest ago first. Part of every checkpoint."""

    def __init__(self) -> None:
        self._estimates: dict[str, Estimate] = {}

    def __len__(self) -> int:
        return len(self._estimates)

    def observe(self, task_id: str, rewards_G: Sequence[float]) -> None:
        """Takes in the rewards of a group; rewards count as rates of success, held within 0 and 1."""
        if not rewards_G:
            return
        mean = mean_of([min(1.0, max(0.0, reward)) for reward in rewards_G])
        known = self._estimates.pop(task_id, None)
        self._estimates[task_id] = Estimate(mean, 1) if known is None else known.after(mean)
        if len(self._estimates) > REMEMBERED_TASKS:
            self._estimates.pop(next(iter(self._estimates)))

    def success(self, task_id: str) -> float | None:
        """Estimated rate of success; None for a task that nothing is known of."""
        known = self._estimates.get(task_id)
        return None if known is None else known.success

    def metrics(self) -> dict[str, float]:
        """What the estimates come to; nothing before the first."""
        values = [estimate.success for estimate in self._estimates.values()]
        if not values:
            return {}
        return {
            "tasks/known": float(len(values)),
            "tasks/success": mean_of(values),
            "tasks/solved_frac": sum(value >= SOLVED for value in values) / len(values),
            "tasks/hopeless_frac": sum(value <= HOPELESS for value in values) / len(values),
        }

    def state(self) -> list[list[object]]:
        """JSON-compatible."""
        return [[task_id, known.success, known.groups] for task_id, known in self._estimates.items()]

    def restore(self, state: object) -> None:
        """Goes on from what `state` was."""
        self._estimates = {
            str(task_id): Estimate(as_float(success), as_int(groups))
            for task_id, success, groups in map(as_list, as_list(state))
        }
