"""What a task source is, and how its tasks are split and walked.

Held-out tasks are chosen by their text, so that no training task can share a text with an evaluation task, whatever
the source, the order or the seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Protocol

from longshore.config import TasksSpec
from longshore.errors import ConfigError
from longshore.types import Task

MAX_INFO_CHARACTERS = 256 * 1024
_BUCKETS = 10_000
# Tasks looked at before a split is called impossible; at the smallest share (1 in 10 000) one is found in time.
_MAX_SKIPPED = 200_000
_SCAN_FACTOR = 20


class Walkable(Protocol):
    """What a cursor needs of a source."""

    # How many tasks there are; None: endless.
    @property
    def size(self) -> int | None: ...

    def task(self, ordinal: int) -> Task | None:
        """The same ordinal gives the same task, in every process. None: past the end."""
        ...


class TaskSource(Protocol):
    """Problems by number. Constructing one raises InvalidJobSpec for settings that cannot work.

    Example: Source(spec.tasks, seed=7, environment="single-turn").task(0)
    """

    # Names the content, for the run's record: a package's version or a digest.
    version: str
    # How many tasks there are; None: endless.
    size: int | None

    def __init__(self, spec: TasksSpec, seed: int, environment: str) -> None: ...

    def task(self, ordinal: int) -> Task | None:
        """The same ordinal gives the same task, in every process. None: past the end."""
        ...


def prompt_text(task: Task) -> str:
    """The task's text as the split sees it: every message of the problem, so that equal conversations are equal texts.
    Examples that come before the problem are left out: who shows some more of them gets the same split."""
    return json.dumps([[message.role, message.content] for message in task.problem], ensure_ascii=False)


def is_heldout(task: Task, fraction: float) -> bool:
    """Whether a task's text belongs to the held-out share."""
    digest = hashlib.sha256(prompt_text(task).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % _BUCKETS < fraction * _BUCKETS


def is_shown(task: Task) -> bool:
    """Whether a task's problem, with its answer, is one of the examples that come before it."""
    examples, problem = task.messages[: task.num_example_messages], (*task.problem, None)
    width = len(problem)
    return any(
        examples[start : start + width - 1] == problem[:-1] and examples[start + width - 1].role == "assistant"
        for start in range(len(examples) - width + 1)
    )


class TrainCursor:
    """Walks the training tasks, round and round; a finite source is shuffled anew each time.

    `state` is all that a checkpoint needs: a cursor built with it goes on exactly where this one stood.
    """

    def __init__(self, source: Walkable, fraction: float, state: int = 0, *, seed: int = 0) -> None:
        self._source = source
        self._fraction = fraction
        self._seed = seed
        # Tasks passed so far, the held-out ones included.
        self.state = state

    def next(self) -> Task:
        """The next task that is neither held out nor shown as an example. Raises ConfigError when there is none."""
        if self._source.size == 0:
            raise ConfigError("tasks: the source is empty")
        size = self._source.size
        for _ in range(_MAX_SKIPPED if size is None else 2 * size):
            task = self._source.task(self._ordinal(self.state))
            if task is None:
                raise ConfigError(f"tasks: the source ended before its size of {self._source.size} tasks")
            self.state += 1
            if not is_heldout(task, self._fraction) and not is_shown(task):
                return task
        raise ConfigError(f"tasks: no task is left to train on with heldout_fraction {self._fraction}")

    def at(self, position: int) -> Task:
        """The task at a position that this cursor has passed before. Raises ConfigError when it is not there now."""
        task = self._source.task(self._ordinal(position))
        if task is None:
            raise ConfigError(f"tasks: the source ended before its size of {self._source.size} tasks")
        return task

    def _ordinal(self, position: int) -> int:
        size = self._source.size
        if size is None:
            return position
        return _order(self._seed, position // size, size)[position % size]


class FirstTasks:
    """The first `size` tasks of a source, or all of a smaller one; for what wants to see tasks again."""

    def __init__(self, source: TaskSource, size: int) -> None:
        self._source = source
        self.size = size if source.size is None else min(size, source.size)

    def task(self, ordinal: int) -> Task | None:
        """As that of the source."""
        return self._source.task(ordinal) if ordinal < self.size else None


@functools.lru_cache(maxsize=2)
def _order(seed: int, round_: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{round_}").shuffle(order)  # noqa: S311 - repeatable, not secret
    return order


def scan_heldout(source: TaskSource, fraction: float, limit: int) -> Iterator[Task]:
    """Held-out tasks with distinct texts, among the first `limit` of the source, in its order."""
    seen: set[str] = set()
    for ordinal in range(limit):
        task = source.task(ordinal)
        if task is None:
            return
        text = prompt_text(task)
        if text not in seen and is_heldout(task, fraction):
            seen.add(text)
            yield task


def scan_limit(fraction: float, count: int) -> int:
    """How many tasks are looked at to find `count` held-out ones."""
    return int(_SCAN_FACTOR * (count + 10) / max(fraction, 1 / _BUCKETS))


def heldout_tasks(source: TaskSource, fraction: float, count: int) -> list[Task]:
    """The first `count` held-out tasks with distinct texts.

    Raises:
        ConfigError: there are fewer; the text says how many.
    """
    limit = scan_limit(fraction, count)
    found: list[Task] = []
    # Nothing is asked of the source past the last task needed: generating one may be slow.
    if count:
        for task in scan_heldout(source, fraction, limit):
            found.append(task)
            if len(found) == count:
                break
    if len(found) < count:
        raise ConfigError(too_few(len(found), count, fraction))
    return found


def too_few(found: int, wanted: int, fraction: float) -> str:
    """What to say when held-out tasks run out."""
    return (
        f"{wanted} held-out tasks are wanted, but heldout_fraction {fraction} leaves {found} with different texts; "
        f"raise tasks.heldout_fraction, add tasks, or ask for at most {found}"
    )
