"""Copies what pods write into the job's folder, where `longshore logs` and the REST API read it.

consumes   logs of a job's pods, by the cluster's API     waits for     nothing: it is called once a look
produces   logs/NAME.log, of whole lines
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

import structlog

from longshore.errors import Unavailable

log = structlog.get_logger()

LOOK_EVERY_S = 5.0
# Of one pod at a time; what a pod writes faster than this is left out.
_MAX_BYTES = 1024 * 1024
_AT_ONCE = 8
# How far back the first look goes, and how much each one overlaps the one before.
_FIRST_S, _OVERLAP_S = 3600, 5


class LogSource(Protocol):
    """What gives a pod's log, as Cluster does."""

    async def log(self, pod: str, since_s: int, limit_bytes: int) -> str: ...


class PodLogs:
    """Of one cluster. It forgets where it was when the gateway ends; then the last lines may come twice."""

    def __init__(self) -> None:
        # Pod -> (when it was looked at, time stamp of the last line that was copied).
        self._seen: dict[str, tuple[float, str]] = {}
        self._next = 0.0

    async def copy(self, source: LogSource, pods: dict[str, Path]) -> None:
        """`pods`: name of each pod, and the file that its lines are added to. Raises Unavailable."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_EVERY_S
        self._seen = {pod: seen for pod, seen in self._seen.items() if pod in pods}
        gate = asyncio.Semaphore(_AT_ONCE)
        results = await asyncio.gather(
            *(self._copy_one(source, pod, path, now, gate) for pod, path in pods.items()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, OSError):
                log.warning("log not copied", reason=str(result))
            elif isinstance(result, BaseException):
                raise result

    async def _copy_one(self, source: LogSource, pod: str, path: Path, now: float, gate: asyncio.Semaphore) -> None:
        looked, last = self._seen.get(pod, (now - _FIRST_S, ""))
        async with gate:
            try:
                text = await source.log(pod, int(now - looked) + _OVERLAP_S, _MAX_BYTES)
            except Unavailable as error:
                log.debug("log not read", pod=pod, reason=str(error))
                return
        lines, last = new_lines(text, last)
        self._seen[pod] = (now, last)
        if lines:
            await asyncio.to_thread(_append, path, "".join(f"{line}\n" for line in lines))


def new_lines(text: str, last: str) -> tuple[list[str], str]:
    """The lines after the time stamp `last`, without their stamps, and the newest stamp.

    Example: new_lines("2026-01-01T00:00:01Z a\\n2026-01-01T00:00:02Z b\\n", "2026-01-01T00:00:01Z") ->
    (["b"], "2026-01-01T00:00:02Z"). A line without its end may be the part of one: it is left for the next look.
    """
    found: list[str] = []
    newest = last
    whole = text[: text.rfind("\n") + 1]
    for line in whole.splitlines():
        stamp, _, words = line.partition(" ")
        if stamp > last:
            found.append(words)
            newest = max(newest, stamp)
    return found, newest


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
