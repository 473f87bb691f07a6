"""What a process said last, as one line for a person."""

from __future__ import annotations

import json
from pathlib import Path

_TAIL_BYTES = 16 * 1024
_MAX_CHARACTERS = 300


def last_words(log_path: Path) -> str:
    """The gist of a log's last line: plain text as it is, of a JSON line its event and reason; "" without any."""
    try:
        with log_path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A line for people (a traceback's end, "longshore actor: ...") says more than the JSON lines around it.
    gist = _gist(lines[-1]) if lines else ""
    return gist if len(gist) <= _MAX_CHARACTERS else gist[: _MAX_CHARACTERS - 3] + "..."


def _gist(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict):
        return line
    exception = str(entry.get("exception", "")).strip().splitlines()
    reason = entry.get("reason") or (exception[-1] if exception else "")
    event = str(entry.get("event", ""))
    return f"{event}: {reason}" if reason else event or line
