"""Solved examples before every problem: which they are, and that the split never sees them."""

from __future__ import annotations

import pytest
from tiny_tokenizer import assets

from longshore.config import TasksSpec, parse_job
from longshore.errors import InvalidJobSpec
from longshore.learner.groups import Group
from longshore.rpc.convert import task_from_proto, task_to_proto
from longshore.tasks.examples import WithExamples, open_source
from longshore.tasks.rendering import Renderer
from longshore.tasks.source import TrainCursor, heldout_tasks, is_heldout, prompt_text
from longshore.tasks.verification import ScoreRequest
from longshore.types import Message, Purpose, Task
from longshore.verifier.lines import request_from_json, request_to_json


class Sums:
    """Tasks `0+1=`, `1+1=`, ..., with `texts` different ones."""

    version = "1"

    def __init__(self, size: int | None = None, texts: int = 10_000, answers: bool = True) -> None:
        self.size = size
        self._texts, self._answers = texts, answers

    def task(self, ordinal: int) -> Task | None:
        if self.size is not None and ordinal >= self.size:
            return None
        number = ordinal % self._texts
        answer = str(number + 1) if self._answers else None
        return Task(f"sum-{ordinal}", (Message("user", f"{number}+1="),), answer, info={"n": number})


def spec(examples: int, heldout_fraction: float = 0.3) -> TasksSpec:
    return TasksSpec(source="jsonl", examples=examples, heldout_fraction=heldout_fraction)


def bare(task: Task) -> Task:
    return Task(task.task_id, task.problem, task.answer, task.info, task.environment)


def shown(task: Task) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in task.messages[: task.num_example_messages]]


def test_every_task_begins_with_the_same_solved_training_tasks() -> None:
    plain = Sums()
    source = WithExamples(plain, spec(4))
    first, later = source.task(0), source.task(977)
    assert first is not None
    assert later is not None
    assert shown(first) == shown(later)
    assert [role for role, _ in shown(first)] == ["user", "assistant"] * 4
    assert [(bare(task), task.num_example_messages) for task in (first, later)] == [
        (plain.task(0), 8),
        (plain.task(977), 8),
    ]
    for problem, answer in zip(shown(first)[::2], shown(first)[1::2], strict=True):
        assert int(problem[1].removesuffix("+1=")) + 1 == int(answer[1])
        assert not is_heldout(Task("", (Message("user", problem[1]),)), 0.3)


def test_the_split_is_that_of_the_problems_alone() -> None:
    plain, source = Sums(texts=400), WithExamples(Sums(texts=400), spec(4))
    assert [prompt_text(task) for task in heldout_tasks(source, 0.3, 50)] == [
        prompt_text(task) for task in heldout_tasks(plain, 0.3, 50)
    ]


def test_the_examples_own_tasks_are_neither_trained_on_nor_held_out() -> None:
    source = WithExamples(Sums(texts=60), spec(5))
    task = source.task(0)
    assert task is not None
    examples = {content for role, content in shown(task) if role == "user"}
    cursor = TrainCursor(source, 0.3)
    trained = {cursor.next().problem[0].content for _ in range(300)}
    heldout = {task.problem[0].content for task in heldout_tasks(source, 0.3, 5)}
    assert not examples & trained
    assert not examples & heldout
    assert len(trained) > 20


def test_they_are_rendered_as_earlier_turns() -> None:
    task = WithExamples(Sums(), spec(1, heldout_fraction=0.0)).task(7)
    assert task is not None
    renderer = Renderer(assets())
    ids = renderer.prompt_ids(list(task.messages))
    assert renderer._tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\n0+1=<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\n7+1=<|im_end|>\n<|im_start|>assistant\n"
    )


def test_they_travel_with_the_task() -> None:
    task = WithExamples(Sums(), spec(2)).task(3)
    assert task is not None
    assert task_from_proto(task_to_proto(task)) == task
    assert Group.restore(Group(1, Purpose.TRAIN, task, 4).state()).task == task
    request = ScoreRequest(task, [*task.messages, Message("assistant", "4")], "4")
    assert request_from_json(request_to_json(request)) == request


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Sums(answers=False), "has no answer to show"),
        (Sums(size=40, texts=3), "different training tasks"),
    ],
)
def test_too_few_examples_are_a_fault_of_the_job(source: Sums, message: str) -> None:
    with pytest.raises(InvalidJobSpec, match=message) as caught:
        WithExamples(source, spec(4))
    assert [fault.path for fault in caught.value.faults] == ["tasks.examples"]


def test_none_are_shown_unless_asked_for() -> None:
    tasks = {"source": "reasoning-gym", "dataset": "chain_sum"}
    job = parse_job({"name": "j", "tasks": tasks, "verifier": {"name": "reasoning-gym"}, "train": {"steps": 1}})
    task = open_source(job.tasks, 0, "single-turn").task(0)
    assert task is not None
    assert (task.num_example_messages, len(task.messages)) == (0, 1)


def test_other_environments_do_not_show_them() -> None:
    document = {
        "name": "j",
        "tasks": {"source": "reasoning-gym", "dataset": "chain_sum", "examples": 2},
        "environment": {"name": "guess-number", "max_turns": 3},
        "verifier": {"name": "reasoning-gym"},
        "train": {"steps": 1},
    }
    with pytest.raises(InvalidJobSpec, match=r"tasks\.examples.*single-turn"):
        parse_job(document)
