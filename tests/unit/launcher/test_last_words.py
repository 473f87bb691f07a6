from __future__ import annotations

from pathlib import Path

import pytest

from longshore.launcher.last_words import last_words

TRACE = "Traceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("starting\nlongshore actor: no such broker\n\n", "longshore actor: no such broker"),
        ('{"event": "cannot start", "reason": "port taken", "level": "error"}\n', "cannot start: port taken"),
        ('{"event": "rpc failed", "exception": "Traceback\\n  x\\nValueError: bad"}', "rpc failed: ValueError: bad"),
        ('{"event": "serving"}', "serving"),
        ("  | ValueError: in a group\n  +------------\n", "ValueError: in a group"),
        ("[1, 2]", "[1, 2]"),
        (f"{TRACE}  File x\n    y()\na.b.Error: bad\n[more]\n(Background)\n", "a.b.Error: bad"),
        (
            f"  + {TRACE}  |   File x\n  | Group: 1\n  +- 1 -\n    | {TRACE}    |   File x\n    | E: in\n    +---\n",
            "E: in",
        ),
        (f"{TRACE}E: early\n{TRACE}E: late\n", "E: late"),
        (f"{TRACE}E: old\nlongshore actor: no broker\n", "longshore actor: no broker"),
        (f"{TRACE}  File cut off", "File cut off"),
    ],
)
def test_the_gist_of_the_last_line(tmp_path: Path, log: str, words: str) -> None:
    path = tmp_path / "x.log"
    path.write_text(log)
    assert last_words(path) == words


def test_only_the_end_is_read_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("first\n" * 10_000 + "y" * 1000)
    words = last_words(path)
    assert words == "y" * 297 + "..."


def test_no_log_no_words(tmp_path: Path) -> None:
    assert last_words(tmp_path / "none.log") == ""
