"""Journals of rollouts in progress: what an actor has finished of one, turn by turn, kept at its site's broker.

Fenced like a delivery: only the attempt that holds the ticket writes. A journal ends with its ticket. The bytes of a
turn are opaque here. Every method raises BrokerLost when the broker stays away; all of them can be called again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zstandard
from redis.asyncio import Redis

from longshore.errors import Fenced, IntegrityError, Rejected
from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.tickets import Claim
from longshore.types import JobRef

# Packed bytes of one rollout's journal. A million tokens with their log-probs take about 6 MiB.
MAX_JOURNAL_BYTES = 16 * 1024 * 1024
MAX_TURN_BYTES = 64 * 1024 * 1024
_LEVEL = 1


class Journal:
    """The journals of one job at one site."""

    def __init__(self, redis: Redis, job: JobRef, site: str = "home") -> None:
        self._redis = redis
        self._keys = JobKeys(job, site)

    async def append(self, claim: Claim, index: int, turn: bytes) -> None:
        """Keeps turn number `index` (from 0); turns from there on that were kept before are replaced.

        Raises:
            Fenced: another attempt holds the ticket, or it has ended: stop work on it.
            Rejected: `oversized` (the whole journal is given up), or `gap`: the turns before are not there.
            BrokerFull: there is no room; the rollout can go on without a journal.
        """
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(turn)
        reply = await broker.call(self._redis, self._keys, "journal", *claim.fence, index, packed, MAX_JOURNAL_BYTES)
        if reply == b"taken":
            raise _fenced(claim)
        if reply != b"ok":
            reason = reply.decode()
            raise Rejected(reason, f"journal of {claim.ticket.ref.key}, turn {index} of {len(packed)} bytes")

    async def read(self, claim: Claim) -> list[bytes]:
        """The turns that earlier attempts finished, oldest first; none: start anew.

        Raises:
            IntegrityError: it is damaged.
        """
        with broker.reaching():
            found: Sequence[Any] = await self._redis.lrange(self._name(claim), 0, -1)
        try:
            unpacker = zstandard.ZstdDecompressor()
            # A frame declares its size; nothing larger is ever written.
            if any(not 0 <= zstandard.frame_content_size(item) <= MAX_TURN_BYTES for item in found):
                raise IntegrityError(f"the journal of {claim.ticket.ref.key} declares a wrong size")
            return [unpacker.decompress(item) for item in found]
        except zstandard.ZstdError:
            raise IntegrityError(f"the journal of {claim.ticket.ref.key} is damaged") from None

    async def clear(self, claim: Claim) -> None:
        """Forgets the journal, so that the next attempt starts anew. Raises Fenced as `append`."""
        if not await broker.call(self._redis, self._keys, "clear_journal", *claim.fence):
            raise _fenced(claim)

    def _name(self, claim: Claim) -> str:
        return f"{self._keys.ticket_prefix}{claim.ticket.ref.key}:journal"


def _fenced(claim: Claim) -> Fenced:
    return Fenced(f"ticket {claim.ticket.ref.key}, attempt {claim.attempt}: it is no longer held")
