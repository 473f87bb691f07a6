"""Files of JSON lines: what must be on disk before anything is done that it tells of. A torn last line is cut off."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, item: Mapping[str, object], sync: bool = True) -> None:
    """Returns when the line is on disk, or, without `sync`, with the system on its way there.

    Raises:
        OSError: the line could not be written whole; then nothing of it is.
    """
    data = json.dumps(item, separators=(",", ":")).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, "no room for the whole line", str(path))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def newest_epoch(*paths: Path) -> int:
    """The highest learner epoch that any line of these files was written under; 0: none."""
    return max((int(item["epoch"]) for path in paths for item in read_lines(path)), default=0)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line, oldest first. What a crash left of a last line is cut off the file."""
    if not path.exists():
        return []
    items: list[dict[str, Any]] = []
    good = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            good += len(line)
            items.append(json.loads(line))
    if good < path.stat().st_size:
        os.truncate(path, good)
    return items
