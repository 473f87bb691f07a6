"""What every built-in task source promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longshore.config import TasksSpec
from longshore.rpc import convert
from longshore.tasks import registry
from longshore.tasks.source import TaskSource, prompt_text

SUMS = Path(__file__).parents[2] / "examples" / "data" / "sums.jsonl"
SPECS = {
    "jsonl": TasksSpec(source="jsonl", path=SUMS),
    "reasoning-gym": TasksSpec(source="reasoning-gym", dataset="spell_backward", options={"min_word_len": 3}),
}
_PRINT_TEXTS = """
import sys
from longshore.config import TasksSpec
from longshore.tasks import registry
from longshore.tasks.source import prompt_text
spec = TasksSpec.model_validate_json(sys.argv[1])
source = registry.load(registry.SOURCES, spec.source)(spec, 11, "single-turn")
print([prompt_text(source.task(n)) for n in range(20)])
"""


def make(name: str, seed: int = 11) -> TaskSource:
    made: TaskSource = registry.load(registry.SOURCES, name)(SPECS[name], seed, "an-environment")
    return made


def test_all_are_tested() -> None:
    assert registry.names(registry.SOURCES) == sorted(SPECS)


@pytest.mark.parametrize("name", SPECS)
class TestSource:
    def test_a_number_names_one_task(self, name: str) -> None:
        first, second = make(name), make(name)
        assert [first.task(n) for n in (0, 5, 1, 5)] == [second.task(n) for n in (0, 5, 1, 5)]
        assert first.version == second.version != ""

    def test_and_in_every_process(self, name: str) -> None:
        argv = [sys.executable, "-c", _PRINT_TEXTS, SPECS[name].model_dump_json()]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
        source = make(name)
        assert done.stdout.strip() == str([prompt_text(task) for n in range(20) if (task := source.task(n))])

    def test_tasks_are_whole(self, name: str) -> None:
        source = make(name)
        tasks = [task for n in range(50) if (task := source.task(n))]
        assert len({task.task_id for task in tasks}) == 50
        for task in tasks:
            assert task.environment == "an-environment"
            assert task.messages
            assert all(message.content for message in task.messages)
            assert json.loads(json.dumps(task.info)) == task.info
            assert convert.task_from_proto(convert.task_to_proto(task)) == task

    def test_its_size_is_where_it_ends(self, name: str) -> None:
        source = make(name)
        if source.size is None:
            assert source.task(10**7) is not None
        else:
            assert source.task(source.size - 1) is not None
            assert source.task(source.size) is None
