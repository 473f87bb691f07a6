"""Which training tasks are attempted next: those of a middling rate of success more often than those that always or
never succeed, which teach nothing."""

from __future__ import annotations

import hashlib

from longshore.config_curriculum import CurriculumSpec
from longshore.learner.difficulty import TaskBook
from longshore.tasks.source import TrainCursor

# Tasks that one may pass over; the next one is then taken as it is.
MAX_PASSED = 256


def chance(success: float | None, spec: CurriculumSpec) -> float:
    """Chance that a task is taken when its turn comes: 1 - |p - target| / max(target, 1 - target), at least `least`.
    One that nothing is known of is always taken.

    Example: with target 0.5 and least 0.1, chance(0.75) == 0.5 and chance(1.0) == 0.1
    """
    if success is None:
        return 1.0
    return max(spec.least, 1.0 - abs(success - spec.target) / max(spec.target, 1.0 - spec.target))


class Curriculum:
    """Walks the tasks as a cursor does, and passes some over. What it chose is on record as positions: the estimates
    by which it chose are not the same when an incarnation comes by there again."""

    def __init__(self, cursor: TrainCursor, known: TaskBook, spec: CurriculumSpec, seed: int) -> None:
        self._cursor, self._known, self._spec, self._seed = cursor, known, spec, seed

    def next(self) -> int:
        """The next position whose task is taken; the cursor stands behind it then. Raises as TrainCursor.next."""
        for _ in range(MAX_PASSED):
            task = self._cursor.next()
            position = self._cursor.state - 1
            if _unit(f"{self._seed}/{position}") < chance(self._known.success(task.task_id), self._spec):
                return position
        self._cursor.next()
        return self._cursor.state - 1


def _unit(text: str) -> float:
    """A number in [0, 1) from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
