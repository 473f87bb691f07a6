"""What a process said last, as one line for a person."""

from __future__ import annotations

import json
from pathlib import Path

_TAIL_BYTES = 16 * 1024
_MAX_CHARACTERS = 300
_TRACEBACK = "Traceback (most recent call last)"


def last_words(log_path: Path) -> str:
    """The gist of a log's end: of a JSON line its event and reason, of a traceback the error, else the last line; ""
    for an empty or missing log."""
    try:
        with log_path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return gist(text)


def gist(text: str) -> str:
    """The same of a log's end that has been read already."""
    # Exception groups are drawn with bars and rules, which say nothing.
    lines = [line for line in text.splitlines() if any(character.isalnum() for character in line)]
    found = _gist(lines) if lines else ""
    return found if len(found) <= _MAX_CHARACTERS else found[: _MAX_CHARACTERS - 3] + "..."


def _gist(lines: list[str]) -> str:
    last = lines[-1].strip(" |\t")
    try:
        entry = json.loads(last)
    except ValueError:
        # A process says itself why it ends; a traceback speaks for those that could not.
        return last if last.startswith("longshore") else _error(lines) or last
    return _of_entry(entry) or last if isinstance(entry, dict) else last


def _of_entry(entry: dict[str, object]) -> str:
    exception = str(entry.get("exception", "")).strip().splitlines()
    reason = entry.get("reason") or (_error(exception) or exception[-1] if exception else "")
    event = str(entry.get("event", ""))
    return f"{event}: {reason}" if reason else event


def _error(lines: list[str]) -> str:
    """The line that names the error of the last traceback; its message may go on for more lines."""
    starts = [index for index, line in enumerate(lines) if _TRACEBACK in line]
    if not starts:
        return ""
    indent = lines[starts[-1]].partition(_TRACEBACK)[0]
    for line in lines[starts[-1] + 1 :]:
        if line.startswith(indent) and not line[len(indent) :].startswith((" ", "|", "+")):
            return line[len(indent) :]
    return ""
