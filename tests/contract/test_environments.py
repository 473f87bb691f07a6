"""What every built-in environment promises."""

from __future__ import annotations

import pytest

from longshore.tasks import registry
from longshore.tasks.environment import Environment
from longshore.types import Message, Task

TASK = Task("t", (Message("system", "Be short."), Message("user", "3+4=")), answer="7")
NAMES = ("single-turn",)


def make(name: str) -> Environment:
    made: Environment = registry.load(registry.ENVIRONMENTS, name)({})
    return made


def test_all_are_tested() -> None:
    assert registry.names(registry.ENVIRONMENTS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestEnvironment:
    def test_it_starts_with_the_task_and_ends(self, name: str) -> None:
        environment = make(name)
        first = environment.start(TASK)
        assert first == list(TASK.messages)
        assert environment.step("7").done

    def test_one_rollout_leaves_nothing_to_the_next(self, name: str) -> None:
        first = make(name)
        first.start(TASK).append(Message("user", "changed"))
        first.step("7")
        assert make(name).start(TASK) == list(TASK.messages)

    def test_unknown_options_are_named(self, name: str) -> None:
        check = registry.load(registry.ENVIRONMENTS, name).check_options  # type: ignore[attr-defined]
        assert check({}) == []
        assert "colour" in check({"colour": "red"})[0]
