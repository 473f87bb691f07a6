"""The logs of a job's processes, as lines. Reads files; knows nothing of HTTP."""

from __future__ import annotations

import re
from pathlib import Path

from longshore.errors import NotFound

# Of one file, at a time.
MAX_READ_BYTES = 1024 * 1024


def log_files(folder: Path, service: str | None) -> dict[str, Path]:
    """Process name -> log. A service stands for all its processes ("actor": actor-0, actor-1); None for everything.

    Raises:
        NotFound: no process of that name has written a log; says which have.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if service is None:
        return found
    wanted = {name: path for name, path in found.items() if name == service or re.sub(r"-\d+$", "", name) == service}
    if not wanted:
        raise NotFound(f"there is no log of {service!r}; there are: {', '.join(found) or 'none yet'}")
    return wanted


class LogReader:
    """Reads on in one log. Example: LogReader(path, tail=200).read() then read() again for what has been added"""

    def __init__(self, path: Path, tail: int) -> None:
        self._path = path
        self._tail: int | None = tail
        self._offset = 0

    def read(self) -> list[str]:
        """The whole lines since the last call, the first time the last `tail` ones; at most about a mebibyte."""
        try:
            with self._path.open("rb") as file:
                end = file.seek(0, 2)
                if self._tail is not None:
                    self._offset = max(0, end - MAX_READ_BYTES)
                file.seek(self._offset)
                data = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == MAX_READ_BYTES:
            # A line without an end must not hold up what comes after it.
            whole = len(data)
        self._offset += whole
        lines = data[:whole].decode("utf-8", errors="replace").splitlines()
        if self._tail is not None:
            lines, self._tail = lines[max(0, len(lines) - self._tail) :], None
        return lines


def labelled(name: str, lines: list[str], alone: bool) -> str:
    """Lines as text, each with its process's name unless it is the only one."""
    return "".join(f"{line}\n" if alone else f"{name} | {line}\n" for line in lines)
