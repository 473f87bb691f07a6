"""Which entries of the rollouts stream its reader has had: each is handed out at least once, whatever happens between.

Knows ids, and nothing of what an entry holds. Every method raises BrokerLost when the broker stays away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from redis.asyncio import Redis

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import LEARNER, JobKeys

# How often a reader looks for entries that another took from it.
LOOK_S = 10.0
_PAGE = 1000


class StreamReader:
    """One life of the only reader of a job's rollouts at one site."""

    def __init__(self, redis: Redis, keys: JobKeys) -> None:
        self._redis = redis
        self._keys = keys
        # Newest entry that we have handed out, and all of them that may not be acknowledged yet.
        self._newest = "0"
        self._given: set[str] = set()
        self._looked = time.monotonic()

    async def next(self, count: int, block_ms: int) -> list[broker.Entry]:
        """Up to `count` entries that were not handed out; waits for the first up to `block_ms`.

        They come again until they are told of by `gave`.
        """
        if taken := await self._taken(count):
            return taken
        # Sent to us in a reply that got lost, or to a learner that we superseded: pending, and newer than ours.
        return await self._read(self._newest, count, 0) or await self._read(">", count, block_ms)

    async def pending(self, after: str, count: int) -> list[broker.Entry]:
        """Up to `count` entries after the id `after` that were read, by whichever life, and not acknowledged."""
        return await self._read(after, count, 0)

    def gave(self, found: Sequence[broker.Entry]) -> None:
        """These have been handed out."""
        ids = [entry_id for entry_id, _ in found]
        self._given.update(ids)
        self._newest = max([self._newest, *ids], key=_order)

    async def _taken(self, count: int) -> list[broker.Entry]:
        """Now and then: pending entries older than our newest that we never had.

        A reader that we superseded, and that does not know it yet, reads like we do: reading is not fenced. What it got
        between two of ours is behind us.
        """
        if time.monotonic() - self._looked < LOOK_S:
            return []
        pending = await self._all_pending()
        self._given.intersection_update(pending)
        strange = [entry_id for entry_id in pending if entry_id not in self._given]
        taken = [entry_id for entry_id in strange if _order(entry_id) < _order(self._newest)][:count]
        if not taken:
            self._looked = time.monotonic()
        found: list[broker.Entry] = []
        with broker.reaching():
            for entry_id in taken:
                found += broker.entries(await self._redis.xrange(self._keys.rollouts, entry_id, entry_id))
        return found

    async def _all_pending(self) -> list[str]:
        ids: list[str] = []
        after = "-"
        while page := await self._page(after):
            ids += page
            after = f"({page[-1]}"
        return ids

    async def _page(self, after: str) -> list[str]:
        stream = self._keys.rollouts
        found = await broker.healed(
            self._redis, self._keys, lambda: self._redis.xpending_range(stream, LEARNER, after, "+", _PAGE)
        )
        return [broker.text(item["message_id"]) for item in found]  # type: ignore[arg-type] # of ids and numbers

    async def _read(self, after: str, count: int, block_ms: int) -> list[broker.Entry]:
        return await broker.read_group(
            self._redis, self._keys, self._keys.rollouts, LEARNER, LEARNER, after, count, block_ms
        )


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
