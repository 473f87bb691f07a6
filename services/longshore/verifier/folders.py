"""The folders in which scoring processes run: made empty, and found again when their verifier was killed.

A folder is locked for as long as its verifier lives; the lock ends with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "longshore-verifier-"
# Between its making and its lock a folder looks like one that nobody has.
_YOUNG_S = 60.0


class WorkFolder:
    """One locked, empty folder."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """What a process that is still ending writes meanwhile stays, for `sweep`."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep() -> int:
    """Removes what verifiers that were killed left behind. Returns how many folders."""
    removed = 0
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # It may be somebody else's, or gone by now.
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _YOUNG_S and _is_free(path):
                shutil.rmtree(path)
                removed += 1
    return removed


def _is_free(path: Path) -> bool:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
