"""A job's events, for whoever watches it, and the one command that waits for its learner.

Events are kept for a while, not for ever: the stream holds about the newest 20000. Knows nothing of what they say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from redis.asyncio import Redis

from longshore.errors import Rejected
from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.types import JobRef

MAX_EVENTS = 20_000
MAX_EVENT_BYTES = 256 * 1024
_MAX_REQUEUES_READ = 1000


class JobChannel:
    """Events and commands of one job. Every method raises BrokerLost when the broker stays away."""

    def __init__(self, redis: Redis, job: JobRef) -> None:
        self._redis = redis
        self._keys = JobKeys(job)

    async def publish(self, event: dict[str, object]) -> str:
        """Adds a JSON-compatible event and returns its id. One whose reply was lost can be there twice.

        Raises:
            Rejected: `oversized`.
        """
        text = json.dumps(event, allow_nan=False)
        if len(text) > MAX_EVENT_BYTES:
            raise Rejected("oversized", f"an event of {len(text)} bytes, at most {MAX_EVENT_BYTES} are allowed")
        with broker.reaching():
            entry_id = await self._redis.xadd(self._keys.events, {"json": text}, maxlen=MAX_EVENTS, approximate=True)
        return broker.text(entry_id)

    async def read(self, after: str, count: int, block_ms: int) -> list[tuple[str, dict[str, object]]]:
        """Up to `count` (id, event) after the id `after` ("0": from the oldest kept), oldest first.

        Waits for the first up to `block_ms`: at most 10 s; 0: not at all.
        """
        block = min(block_ms, broker.MAX_BLOCK_MS) if block_ms > 0 else None
        with broker.reaching():
            found = await self._redis.xread({self._keys.events: after}, count=count, block=block)
        entries = broker.entries_of(found, self._keys.events)
        return [(entry_id, json.loads(fields[b"json"])) for entry_id, fields in entries]

    async def requeues(self) -> list[tuple[str, bytes]]:
        """(id, serialised Task) of every task that people want attempted again, oldest first; see DeadLetters."""
        with broker.reaching():
            found = await self._redis.xrange(self._keys.requeues, count=_MAX_REQUEUES_READ)
        return [(entry_id, fields.get(b"task", b"")) for entry_id, fields in broker.entries(found)]

    async def drop_requeues(self, ids: Sequence[str]) -> None:
        """Forgets wishes whose groups a durable checkpoint contains."""
        if ids:
            with broker.reaching():
                await self._redis.xdel(self._keys.requeues, *ids)

    async def command(self, name: str) -> None:
        """Leaves a command, for example "cancel", in place of an earlier one."""
        with broker.reaching():
            await self._redis.set(self._keys.command, name)

    async def pending_command(self) -> str | None:
        """The newest command; it stays until the job is forgotten."""
        with broker.reaching():
            name = await self._redis.get(self._keys.command)
        return None if name is None else broker.text(name)
