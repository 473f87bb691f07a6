"""The reasoning-gym source and verifier, and what they refuse."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from longshore.config import TasksSpec
from longshore.errors import InvalidJobSpec, Rejected
from longshore.rpc import convert
from longshore.tasks.reasoning_gym import (
    RUNS_CODE,
    ReasoningGymSource,
    ReasoningGymVerifier,
    usable_datasets,
)
from longshore.tasks.verification import ScoreRequest
from longshore.types import Message, Task

_RUN_TEXT = {"eval", "exec", "compile", "parse_expr", "sympify", "lambdify", "literal_eval", "__import__"}


def source(dataset: str | None, **options: object) -> ReasoningGymSource:
    return ReasoningGymSource(TasksSpec(source="reasoning-gym", dataset=dataset, options=options), 7, "single-turn")


def over_the_wire(task: Task | None) -> Task:
    """As a verifier gets it: through a ticket and a request."""
    assert task is not None
    return convert.task_from_proto(convert.task_to_proto(task))


def score(task: Task, reply: str, **options: object) -> float:
    request = ScoreRequest(task, [*task.messages, Message("assistant", reply)], reply)
    return ReasoningGymVerifier(options).score(request).reward


def called_names(function: Callable[..., Any], kind: type) -> set[str]:
    """Names of everything that a method calls, directly or through the library's own functions."""
    names: set[str] = set()
    seen: set[object] = set()
    waiting: list[Any] = [function]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        module = sys.modules[current.__module__]
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(current)))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            names.add(name)
            for found in (getattr(kind, name, None), getattr(module, name, None)):
                if inspect.isfunction(found) and found.__module__.startswith("reasoning_gym"):
                    waiting.append(found)
    return names


def test_every_scorer_that_runs_text_is_refused() -> None:
    """Fails when an upgrade of the library brings another one."""
    runs = {name for name, (kind, _) in DATASETS.items() if called_names(kind.score_answer, kind) & _RUN_TEXT}
    assert runs == RUNS_CODE
    assert not RUNS_CODE & set(usable_datasets())


@pytest.mark.parametrize("dataset", sorted(RUNS_CODE))
def test_refused_at_the_source_and_at_the_verifier(dataset: str) -> None:
    with pytest.raises(
        InvalidJobSpec, match=r"tasks\.dataset: its scorer evaluates the answer as code; needs the sand"
    ):
        source(dataset)
    forged = Task("x", (Message("user", "1"),), "1", {"reasoning_gym": {"dataset": dataset, "entry": {"answer": "1"}}})
    with pytest.raises(Rejected, match="evaluates the answer as code"):
        score(forged, "__import__('os').system('true')")


@pytest.mark.parametrize(
    "dataset",
    ["spell_backward", "letter_counting", "chain_sum", "word_sorting", "base_conversion", "rearc"],
)
def test_the_reference_answer_scores_1_after_the_wire(dataset: str) -> None:
    made = source(dataset)
    for ordinal in range(3):
        task = over_the_wire(made.task(ordinal))
        assert task.answer is not None
        assert score(task, task.answer) == 1.0
        assert score(task, f"\n {task.answer} ") == 1.0
        assert score(task, "nonsense, surely") < 1.0


def test_scoring_is_the_library_s_own() -> None:
    task = over_the_wire(source("spell_backward", min_word_len=5).task(4))
    dataset = reasoning_gym.create_dataset("spell_backward", seed=7, size=10, min_word_len=5)
    for reply in (str(task.answer), str(task.answer)[1:] + "x", "", "x" * 1000):
        assert score(task, reply) == dataset.score_answer(reply, dataset[4])


def test_options_reach_both_ends() -> None:
    task = source("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1).task(0)
    assert task is not None
    assert task.messages[0].content.count("+") + task.messages[0].content.count("-") == 1
    # The verifier makes the data set with the source's options, some of which decide the score.
    info = task.info["reasoning_gym"]
    assert isinstance(info, dict)
    assert info["options"] == {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_extract() -> None:
    task = over_the_wire(source("chain_sum").task(0))
    options = {"extract": "<answer>(.*?)</answer>"}
    assert score(task, f"Thinking...<answer>0</answer> no: <answer> {task.answer}\n</answer>", **options) == 1.0
    assert score(task, str(task.answer), **options) == 0.0


def test_seeds_and_sizes() -> None:
    made = source("chain_sum")
    assert made.size is None
    assert made.task(10**9) == source("chain_sum").task(10**9)
    finite = source("word_ladder")
    assert finite.size == 20_000
    assert finite.task(20_000) is None


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        (None, {}, r"tasks\.dataset: source reasoning-gym needs a data set"),
        ("no_such", {}, r"tasks\.dataset: reasoning-gym has no such data set; it has ab, acre"),
        ("composite", {}, r"tasks\.dataset: mixes data sets"),
        ("codeio", {}, r"tasks\.dataset: makes its problems by running programs that a model wrote"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, r"tasks\.options: reasoning-gym refuses them"),
        ("chain_sum", {"colour": "red"}, r"tasks\.options: reasoning-gym refuses them: .*colour"),
        ("chain_sum", {"seed": 3}, r"tasks\.options\.seed"),
    ],
)
def test_faults(dataset: str | None, options: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidJobSpec, match=says):
        source(dataset, **options)


def test_a_task_from_elsewhere_is_rejected() -> None:
    for info in ({}, {"reasoning_gym": 3}, {"reasoning_gym": {"dataset": "chain_sum"}}):
        with pytest.raises(Rejected):
            score(Task("x", (Message("user", "1"),), "1", info), "1")
    assert "reasoning-gym" in str(ReasoningGymVerifier.check_task(Task("x", (), "1")))


def test_every_usable_data_set_is_json() -> None:
    # A cheap sample: some data sets take seconds a problem.
    for dataset in ("graph_color", "knights_knaves", "coin_flip", "tower_of_hanoi", "propositional_logic"):
        task = source(dataset).task(1)
        assert task is not None
        assert json.loads(json.dumps(task.info)) == task.info
