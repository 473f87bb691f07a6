"""What a response keeps sending: a job's events (server-sent events) and its growing logs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from longshore.gateway.job_logs import LogReader, labelled, log_files
from longshore.gateway.states import JobState
from longshore.gateway.store import Event, JobStore, wait_for_any

# Often enough that proxies keep the connection.
KEEP_ALIVE_S = 15.0
_PAGE = 500
_LOG_POLL_S = 0.5


async def event_stream(store: JobStore, job_id: str, after: int, stop: asyncio.Event) -> AsyncIterator[str]:
    """A job's events after an id; ends after the event of its terminal state, or when the gateway drains."""
    # The last event of a job that has ended may lie before `after`: then there is nothing to wait for.
    while not stop.is_set():
        changed = store.changed()
        ended = (await store.get(job_id)).state.ended
        page = await store.events(job_id, after, _PAGE)
        for event in page:
            yield sse(event)
            after = event.id
            if event.type == "state" and JobState(event.body["state"]).ended:
                return
        if page:
            continue
        if ended:
            return
        await wait_for_any(changed, stop, timeout=KEEP_ALIVE_S)
        if not changed.is_set():
            yield ": still here\n\n"


def sse(event: Event) -> str:
    """One server-sent event."""
    data = json.dumps({"type": event.type, "time": iso_time(event.time), **event.body})
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"


def iso_time(seconds: float) -> str:
    """Unix seconds as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def log_stream(
    store: JobStore, job_id: str, folder: Path, service: str | None, tail: int, stop: asyncio.Event
) -> AsyncIterator[str]:
    """Log lines as they are written, until the job has ended."""
    readers: dict[str, LogReader] = {}
    while True:
        ended = stop.is_set() or (await store.get(job_id)).state.ended
        # Looked up each time: a process may write its first line later.
        files = await asyncio.to_thread(log_files, folder, service)
        for name, path in files.items():
            reader = readers.setdefault(name, LogReader(path, tail))
            lines = await asyncio.to_thread(reader.read)
            if lines:
                yield labelled(name, lines, len(files) == 1)
        if ended:
            return
        await wait_for_any(stop, timeout=_LOG_POLL_S)
