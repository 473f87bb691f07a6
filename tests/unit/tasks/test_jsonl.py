"""The jsonl source: what it takes, and how it names what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longshore.config import TasksSpec
from longshore.errors import ConfigError, InvalidJobSpec
from longshore.tasks.jsonl import MAX_FAULTS, MAX_LINE_BYTES, JsonlSource
from longshore.types import Message


def source(path: Path, *lines: str) -> JsonlSource:
    path.write_text("\n".join(lines), encoding="utf-8")
    return JsonlSource(TasksSpec(source="jsonl", path=path), 0, "single-turn")


def faults(path: Path, *lines: str) -> list[str]:
    with pytest.raises(InvalidJobSpec) as raised:
        source(path, *lines)
    return [f"{fault.path}: {fault.message}" for fault in raised.value.faults]


def test_reads_strings_and_conversations(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "3+4="}]
    made = source(
        tmp_path / "sums.jsonl",
        '{"prompt": "3+4=", "answer": "7"}',
        "",
        json.dumps({"prompt": chat, "info": {"level": 2}, "id": "mine"}),
        '{"prompt": "größer als 3? \\ud83d\\ude00"}',
    )
    assert made.size == 3
    first, second, third = (made.task(ordinal) for ordinal in range(3))
    assert first is not None
    assert (first.task_id, first.messages, first.answer) == ("sums-1", (Message("user", "3+4="),), "7")
    assert second is not None
    assert second.messages == (Message("system", "Be short."), Message("user", "3+4="))
    assert (second.task_id, second.info, second.answer) == ("mine", {"level": 2}, None)
    assert third is not None
    assert third.messages[0].content == "größer als 3? 😀"
    assert third.task_id == "sums-4"
    assert made.task(3) is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"answer": "7"}', "prompt must be"),
        ('{"prompt": ""}', "prompt must be"),
        ('{"prompt": "x", "anwser": "7"}', "unknown key 'anwser'"),
        ('{"prompt": "x", "answer": 7}', "answer must be a string"),
        ('{"prompt": "x", "info": []}', "info must be"),
        ('{"prompt": "x", "id": ""}', "id must be"),
        ('{"prompt": [{"role": "user"}]}', "exactly role and content"),
        ('{"prompt": [{"role": "robot", "content": "x"}]}', "role must be one of"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "' + "x" * MAX_LINE_BYTES + '"}', "is longer than"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_fault_names_its_line(tmp_path: Path, line: str, says: str) -> None:
    (fault,) = faults(tmp_path / "bad.jsonl", '{"prompt": "fine"}', line)
    assert fault.startswith("tasks.path: line 2: ")
    assert says in fault


def test_many_faults_are_cut_short(tmp_path: Path) -> None:
    found = faults(tmp_path / "bad.jsonl", *["nonsense"] * 1000)
    assert len(found) == MAX_FAULTS
    assert "line 20:" in found[-1]


def test_other_faults(tmp_path: Path) -> None:
    assert "holds no tasks" in faults(tmp_path / "empty.jsonl", "", "  ")[0]
    with pytest.raises(InvalidJobSpec, match=r"tasks\.path.*no such file"):
        JsonlSource(TasksSpec(source="jsonl", path=tmp_path / "missing"), 0, "single-turn")
    with pytest.raises(InvalidJobSpec, match=r"tasks\.path.*needs the path.*tasks\.dataset"):
        JsonlSource(TasksSpec(source="jsonl", dataset="chain_sum"), 0, "single-turn")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(InvalidJobSpec, match="line 1"):
        JsonlSource(TasksSpec(source="jsonl", path=binary), 0, "single-turn")


def test_the_version_is_the_content(tmp_path: Path) -> None:
    first = source(tmp_path / "a.jsonl", '{"prompt": "1"}').version
    assert source(tmp_path / "b.jsonl", '{"prompt": "1"}').version == first
    assert source(tmp_path / "c.jsonl", '{"prompt": "2"}').version != first


def test_a_file_that_changes_while_in_use_is_an_error(tmp_path: Path) -> None:
    made = source(tmp_path / "a.jsonl", '{"prompt": "1"}', '{"prompt": "2"}')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a longer first line"}\n{"prompt": "2"}')
    with pytest.raises(ConfigError, match="line 2 changed while in use"):
        made.task(1)
