"""A task source: endless sums of two numbers, such as "17+25=".

Options (`tasks.options`): `largest`, the largest number in a sum (99).
"""

from __future__ import annotations

import random

from longshore.config import TasksSpec
from longshore.errors import Fault, InvalidJobSpec
from longshore.types import Message, Task


class SmallSums:
    """Makes each task from its number and the job's seed alone, so that every process makes the same ones."""

    version = "1"
    # Endless: the cursor never starts over.
    size = None

    def __init__(self, spec: TasksSpec, seed: int, environment: str) -> None:
        largest = spec.options.get("largest", 99)
        if not isinstance(largest, int) or largest < 9:
            raise InvalidJobSpec([Fault("tasks.options.largest", largest, "must be a whole number of at least 9")])
        self._largest, self._seed, self._environment = largest, seed, environment

    def task(self, ordinal: int) -> Task:
        """The same ordinal gives the same task."""
        draw = random.Random(f"{self._seed}/{ordinal}")
        left, right = draw.randint(0, self._largest), draw.randint(0, self._largest)
        return Task(
            task_id=f"small-sums-{ordinal}",
            messages=(Message("user", f"{left}+{right}="),),
            answer=str(left + right),
            environment=self._environment,
        )
