"""A verifier: the nearer the last guess, the higher the reward; a right one early is worth more than late.

Options (`verifier.options`): `scale`, the distance at which a wrong guess is worth half (10).
"""

from __future__ import annotations

from longshore.tasks.verification import ScoreRequest
from longshore.types import Task, Verdict

LATE_TURN_COST = 0.1


class Closeness:
    """Runs in a process of its own, with a time limit; what it raises fails the score, not the job."""

    version = "1"

    def __init__(self, options: dict[str, object]) -> None:
        self._scale = float(str(options.get("scale", 10)))

    @classmethod
    def check_options(cls, options: dict[str, object]) -> list[str]:
        """Optional: what is wrong with `verifier.options`, said before the job starts."""
        scale = options.get("scale", 10)
        good = isinstance(scale, int | float) and scale > 0
        return [] if good else ["scale must be a number above 0"]

    @classmethod
    def check_task(cls, task: Task) -> str | None:
        """Optional: what a task lacks to be scored here."""
        return None if (task.answer or "").isdigit() else "has no number as its answer"

    def score(self, request: ScoreRequest) -> Verdict:
        last = request.turn_info[-1].get("guess") if request.turn_info else None
        turns = len(request.turn_info)
        if not isinstance(last, int):
            return Verdict(0.0, "closeness", {"turns": float(turns)}, reason="the last reply is no number")
        distance = abs(last - int(request.task.answer or "0"))
        closeness = 1 / (1 + distance / self._scale)
        reward = max(0.0, closeness - LATE_TURN_COST * (turns - 1))
        return Verdict(reward, "closeness", {"distance": float(distance), "turns": float(turns)})
