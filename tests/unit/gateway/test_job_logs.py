from __future__ import annotations

from pathlib import Path

import pytest

from longshore.errors import NotFound
from longshore.gateway.job_logs import MAX_READ_BYTES, LogReader, labelled, log_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("learner", "actor-0", "actor-1"):
        (tmp_path / f"{name}.log").write_text(f"{name} here\n")
    (tmp_path / "secret.key").write_text("no")
    return tmp_path


def test_a_service_stands_for_its_processes(folder: Path) -> None:
    assert list(log_files(folder, None)) == ["actor-0", "actor-1", "learner"]
    assert list(log_files(folder, "actor")) == ["actor-0", "actor-1"]
    assert list(log_files(folder, "actor-1")) == ["actor-1"]


@pytest.mark.parametrize("name", ["generator", "../learner", "secret.key", ""])
def test_an_unknown_service_is_told_what_there_is(folder: Path, name: str) -> None:
    with pytest.raises(NotFound, match="there are: actor-0, actor-1, learner"):
        log_files(folder, name)


def test_reading_on_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("1\n2\n3\nhalf")
    reader = LogReader(path, tail=2)
    assert reader.read() == ["2", "3"]
    assert reader.read() == []
    with path.open("a") as file:
        file.write(" done\n5\n")
    assert reader.read() == ["half done", "5"]


def test_no_more_than_a_mebibyte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"x" * (2 * MAX_READ_BYTES) + b"\nlast\n")
    lines = LogReader(path, tail=10).read()
    assert lines[-1] == "last"
    assert sum(map(len, lines)) <= MAX_READ_BYTES


def test_an_endless_line_does_not_block_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"")
    reader = LogReader(path, tail=10)
    assert reader.read() == []
    path.write_bytes(b"x" * (MAX_READ_BYTES + 10) + b"\nlast\n")
    read = [line for _ in range(3) for line in reader.read()]
    assert read[-1] == "last"


def test_bytes_that_are_not_text_are_shown_somehow(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"\xff\xfe ok\n")
    assert LogReader(path, tail=1).read() == ["\ufffd\ufffd ok"]


def test_lines_carry_their_process_unless_alone() -> None:
    assert labelled("a", ["x", "y"], alone=False) == "a | x\na | y\n"
    assert labelled("a", ["x"], alone=True) == "x\n"
