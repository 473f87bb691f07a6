"""Reads a broker's append-only file from outside, while the broker writes it: what it did, in its own order.

Nothing of Longshore takes part in this: the file is the server's, and holds the effects of every function as plain
commands. Knows RESP and the multi-part file's names, and nothing of tickets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

Command = tuple[bytes, ...]
_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Transaction:
    """What was done in one act: a command, or all commands of a function or of a MULTI."""

    commands: tuple[Command, ...]
    # Position in the file just behind it.
    end: int


def parse(data: bytes, start: int = 0) -> Iterator[tuple[Command, int]]:
    """Each whole command from `start` on, with the position behind it; a torn last one is left out.

    Raises:
        ValueError: this is no append-only file.
    """
    while start < len(data):
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return
        if data[start : start + 1] == b"#":
            start = line_end + 2
            continue
        if data[start : start + 1] != b"*":
            raise ValueError(f"expected a command at {start}, found {data[start : start + 20]!r}")
        found = _arguments(data, line_end + 2, int(data[start + 1 : line_end]))
        if found is None:
            return
        command, start = found
        yield command, start


def _arguments(data: bytes, start: int, count: int) -> tuple[Command, int] | None:
    parts = []
    for _ in range(count):
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return None
        begin = line_end + 2
        end = begin + int(data[start + 1 : line_end])
        if end + 2 > len(data):
            return None
        parts.append(data[begin:end])
        start = end + 2
    return tuple(parts), start


def transactions(data: bytes) -> Iterator[Transaction]:
    """Each whole transaction; positions count from the start of `data`."""
    group: list[Command] | None = None
    for command, end in parse(data):
        name = command[0].upper()
        if name == b"MULTI":
            group = []
        elif name == b"EXEC":
            yield Transaction(tuple(group or ()), end)
            group = None
        elif group is not None:
            group.append(command)
        else:
            yield Transaction((command,), end)


class AofFile:
    """The growing end of one broker's append-only file."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the server's `appendonlydir`; it may not be there yet."""
        self._folder = folder
        self._rest = b""
        # Kept open: the server removes a file that it has rewritten, perhaps before we have read its end.
        self._file: BinaryIO | None = None
        self.path: Path | None = None
        # Everything up to here has been handed out.
        self.position = 0

    def read(self) -> list[Transaction]:
        """Whole transactions that were written since the last call, oldest first."""
        if self.path is None:
            first = self._after(None)
            if first is None or not self._open(first):
                return []
        found = self._read_more()
        while not found and (newer := self._after(self.path)) is not None and self._open(newer):
            # A rewrite began a new file; nothing is added to the one before any more.
            found = self._read_more()
        return found

    def rewind(self, position: int) -> None:
        """Goes on reading from an earlier position, a transaction's end, of the same file."""
        self.position = position
        self._rest = b""

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size if self._file is not None else 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path) -> bool:
        """Goes over to a file; False when it has been rewritten and removed already."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return False
        self.close()
        self._file, self.path, self.position, self._rest = file, path, 0, b""
        return True

    def _read_more(self) -> list[Transaction]:
        assert self._file is not None
        found: list[Transaction] = []
        self._file.seek(self.position + len(self._rest))
        while piece := self._file.read(_READ_BYTES):
            self._rest += piece
            found += self._whole()
        return found

    def _whole(self) -> list[Transaction]:
        found = [Transaction(item.commands, self.position + item.end) for item in transactions(self._rest)]
        if found:
            self._rest = self._rest[found[-1].end - self.position :]
            self.position = found[-1].end
        return found

    def _after(self, path: Path | None) -> Path | None:
        """The oldest file that is newer than `path`."""
        numbered = {_number(item): item for item in self._folder.glob("*.incr.aof")}
        newer = [number for number in numbered if path is None or number > _number(path)]
        return numbered[min(newer)] if newer else None


def _number(path: Path) -> int:
    # appendonly.aof.3.incr.aof
    return int(path.name.split(".")[-3])


def cut(path: Path, size: int) -> None:
    """What a crash of the machine may do to a file that is synced once a second: its end is gone."""
    os.truncate(path, size)
