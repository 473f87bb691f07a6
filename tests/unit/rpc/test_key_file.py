"""API keys of a file: who is let in, and when it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from longshore.errors import ConfigError
from longshore.rpc import key_file
from longshore.rpc.key_file import KeyFile, digest_line


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file, "RECHECK_S", 0.0)


def keys(path: Path, text: str) -> KeyFile:
    path.write_text(text)
    return KeyFile(path, "LONGSHORE_X")


def test_each_key_has_its_name(tmp_path: Path) -> None:
    found = keys(tmp_path / "k", "# people\n\n" + digest_line("alice", "one") + digest_line("bob", "two"))
    assert [found.name_of(key) for key in ("one", "two", "three", "", "one ", "\udcff")] == [
        *("alice", "bob", None, None, None, None)
    ]


def test_nobody_is_let_in_by_an_empty_file(tmp_path: Path) -> None:
    assert keys(tmp_path / "k", "").name_of("") is None


@pytest.mark.parametrize(
    "text",
    [
        "s3cret",
        "alice " + "g" * 64,
        "alice " + "a" * 63,
        "a b " + "a" * 64,
        digest_line("a", "1") + digest_line("a", "2"),
    ],
)
def test_a_malformed_file_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"LONGSHORE_X .*line") as caught:
        keys(tmp_path / "k", text)
    assert "s3cret" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        KeyFile(tmp_path / "none", "LONGSHORE_X")


def test_changes_are_seen_and_half_written_ones_wait(tmp_path: Path) -> None:
    path = tmp_path / "k"
    found = keys(path, digest_line("alice", "one"))
    path.write_text(digest_line("alice", "one") + digest_line("alice-2", "two"))
    assert found.name_of("two") == "alice-2"
    path.write_text("half a li")
    assert found.name_of("one") == "alice"
    path.unlink()
    assert found.name_of("one") == "alice"
    path.write_text(digest_line("alice-2", "two"))
    assert (found.name_of("one"), found.name_of("two")) == (None, "alice-2")
