"""What every built-in verifier promises."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from longshore.config import TasksSpec
from longshore.tasks import registry
from longshore.tasks.exact_match import ExactMatch
from longshore.tasks.reasoning_gym import ReasoningGymSource
from longshore.tasks.verification import MAX_EXTRACT_CHARACTERS, ScoreRequest, Verifier
from longshore.types import Message, Task

SUM = Task("sum", (Message("user", "3+4="),), answer="7")
NAMES = ("exact-match", "reasoning-gym")


def fitting_task(name: str) -> Task:
    if name == "exact-match":
        return SUM
    spec = TasksSpec(source="reasoning-gym", dataset="letter_counting")
    task = ReasoningGymSource(spec, 3, "single-turn").task(0)
    assert task is not None
    return task


def make(name: str, **options: object) -> Verifier:
    made: Verifier = registry.load(registry.VERIFIERS, name)(options)
    return made


def request(task: Task, reply: str) -> ScoreRequest:
    return ScoreRequest(task, [*task.messages, Message("assistant", reply)], reply)


def test_all_are_tested() -> None:
    assert registry.names(registry.VERIFIERS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestVerifier:
    def test_right_is_1_and_wrong_is_less(self, name: str) -> None:
        verifier, task = make(name), fitting_task(name)
        assert verifier.score(request(task, f" {task.answer}\n")).reward == 1.0
        assert verifier.score(request(task, "surely not this")).reward < 1.0
        assert verifier.version

    @pytest.mark.parametrize("reply", ["", " \n", "x" * 200_000, "\x00\u202e💥", "(" * 5000, "__import__('os')", "NaN"])
    def test_no_reply_upsets_it(self, name: str, reply: str) -> None:
        reward = make(name).score(request(fitting_task(name), reply)).reward
        assert math.isfinite(reward)
        assert reward < 1.0

    def test_the_same_reply_has_the_same_reward(self, name: str) -> None:
        task = fitting_task(name)
        assert make(name).score(request(task, "5")) == make(name).score(request(task, "5"))

    def test_extract_takes_the_last_match(self, name: str) -> None:
        task = fitting_task(name)
        verifier = make(name, extract="#### (.*)$")
        assert verifier.score(request(task, f"#### {task.answer}")).reward == 1.0
        missing = verifier.score(request(task, str(task.answer)))
        assert (missing.reward, missing.breakdown) == (0.0, {"found": 0.0})

    def test_it_says_what_a_task_lacks(self, name: str) -> None:
        check = registry.load(registry.VERIFIERS, name).check_task  # type: ignore[attr-defined]
        assert check(fitting_task(name)) is None
        assert check(Task("bare", (Message("user", "Sing."),))) is not None


def test_exact_match_options() -> None:
    task = Task("capital", (Message("user", "Capital of Peru?"),), answer="Lima ")
    assert ExactMatch({}).score(request(task, "lima")).reward == 0.0
    assert ExactMatch({"ignore_case": True}).score(request(task, "LIMA")).reward == 1.0
    assert ExactMatch({"extract": "(?i)it is (\\w+)"}).score(request(task, "It is Rome. No: it is Lima")).reward == 1.0


def test_a_pattern_sees_a_bounded_part_of_a_reply() -> None:
    verifier = make("exact-match", extract="<(.)>")
    far = "<7>" + "x" * MAX_EXTRACT_CHARACTERS
    assert verifier.score(request(SUM, far)).reward == 0.0
    assert verifier.score(request(SUM, "x" * MAX_EXTRACT_CHARACTERS + "<7>")).reward == 1.0


def test_exact_match_needs_no_heavy_library() -> None:
    program = "import sys, longshore.tasks.exact_match; print('reasoning_gym' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False False"
