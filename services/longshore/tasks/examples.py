"""Solved examples before every problem of a job (few-shot turns): `tasks.examples`.

A pretrained model that is shown the form of an answer keeps to it more often than one that is told. The examples are
tasks of the same source, as turns of the conversation: the problem from the user, its answer from the assistant. They
are the same for every task, so that what computes with the prompts can share them, and the same in every process.
"""

from __future__ import annotations

import dataclasses

from longshore.config import TasksSpec
from longshore.errors import Fault, InvalidJobSpec
from longshore.tasks import registry
from longshore.tasks.source import TaskSource, is_heldout, prompt_text
from longshore.types import Message, Task

# Tasks that are looked at to find the examples.
_SCANNED = 10_000


class WithExamples:
    """A task source whose tasks come with solved examples before them; see source.TaskSource.

    The examples are the first training tasks of the source whose texts differ: a held-out task is never shown. Their
    own tasks, where the source comes to them, are not for training: `source.TrainCursor` passes over them.
    """

    def __init__(self, source: TaskSource, spec: TasksSpec) -> None:
        """Raises InvalidJobSpec when the source has too few tasks for it, or a task has no answer to show."""
        self._source = source
        self._shown = _examples(source, spec)
        self.version = source.version
        self.size = source.size

    def task(self, ordinal: int) -> Task | None:
        task = self._source.task(ordinal)
        if task is None:
            return None
        return dataclasses.replace(task, messages=(*self._shown, *task.messages), num_example_messages=len(self._shown))


def open_source(spec: TasksSpec, seed: int, environment: str) -> TaskSource:
    """The job's task source, with the examples that the job asks for.

    Raises:
        PluginError: it is not installed.
        InvalidJobSpec: its settings cannot work.
    """
    source: TaskSource = registry.load(registry.SOURCES, spec.source)(spec, seed, environment)
    return WithExamples(source, spec) if spec.examples else source


def _examples(source: TaskSource, spec: TasksSpec) -> tuple[Message, ...]:
    """One example after the other: the messages of its problem, and its answer."""
    seen: set[str] = set()
    shown: list[Message] = []
    for ordinal in range(_SCANNED):
        task = source.task(ordinal)
        if task is None:
            break
        text = prompt_text(task)
        if text in seen or is_heldout(task, spec.heldout_fraction):
            continue
        if task.answer is None:
            raise _fault(spec, f"task {task.task_id} has no answer to show")
        seen.add(text)
        shown += [*task.messages, Message("assistant", task.answer)]
        if len(seen) == spec.examples:
            return tuple(shown)
    raise _fault(spec, f"the source has {len(seen)} different training tasks among its first {_SCANNED}")


def _fault(spec: TasksSpec, message: str) -> InvalidJobSpec:
    return InvalidJobSpec([Fault("tasks.examples", spec.examples, message)])
