"""The tickets that are not final, as the broker knows them, for people. functions.lua tells what a line says."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.types import JobRef

_AT_LEARNER = ("awaiting_verdict", "delivered")


@dataclass(frozen=True)
class LiveTicket:
    """Example: LiveTicket("12.3", "delivered", 1, "west", "1764-0", 2048)"""

    key: str
    state: str
    attempt: int
    site: str
    # Its rollout's entry in the stream and its size, once that is delivered.
    entry_id: str | None = None
    size: int | None = None


class LiveTickets:
    """The live tickets of one job. Every method raises BrokerLost when the broker stays away."""

    def __init__(self, redis: Redis, job: JobRef) -> None:
        self._redis = redis
        self._keys = JobKeys(job)

    async def all(self) -> list[LiveTicket]:
        """By group and index. As many as admission lets out: some batches' worth."""
        with broker.reaching():
            found = await self._redis.hgetall(self._keys.live)
        tickets = [_ticket(broker.text(key), broker.text(line)) for key, line in found.items()]
        return sorted(tickets, key=lambda ticket: order(ticket.key))

    async def get(self, key: str) -> LiveTicket | None:
        """None when it is final, or was never issued."""
        with broker.reaching():
            line = await self._redis.hget(self._keys.live, key)
        return None if line is None else _ticket(key, broker.text(line))


def order(key: str) -> tuple[int, int]:
    """A ticket's group and index."""
    group, _, index = key.partition(".")
    return int(group), int(index)


def _ticket(key: str, line: str) -> LiveTicket:
    state, attempt, site, entry, _, size, *_ = line.split(" ")
    if state in _AT_LEARNER:
        return LiveTicket(key, state, int(attempt), site, entry, int(size))
    return LiveTicket(key, state, int(attempt), site)
