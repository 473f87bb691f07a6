"""Writing to the disk: so that it outlives a crash; and while it is full, a learner waits rather than die of it."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from longshore.errors import Unavailable

log = structlog.get_logger()

T = TypeVar("T")
PATIENCE_S = 600.0
PAUSE_S = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


async def when_there_is_room(write: Callable[[], T], what: str) -> T:
    """Runs `write` in a thread; while the disk is full, again and again. It must leave nothing half-written behind.

    Raises:
        Unavailable: it stayed full for 10 minutes.
        OSError: any other failure of the disk.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await asyncio.to_thread(write)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if time.monotonic() > deadline:
                raise Unavailable(f"the disk has been full for {PATIENCE_S:.0f} s: {what} cannot be written") from None
            log.warning("the disk is full", waiting=what)
        await asyncio.sleep(PAUSE_S)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
