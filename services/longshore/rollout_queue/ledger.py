"""The broker's counts of a job's tickets: issued = sum of the states, at any moment. Reads only."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.types import JobRef

_STATE = "state:"


@dataclass(frozen=True)
class LedgerCounts:
    """Example: LedgerCounts(issued=96, states={"queued": 30, "running": 2, "delivered": 0, "trained": 64})

    The live states are always there; final reasons once a ticket has ended so.
    """

    issued: int
    states: dict[str, int]

    @property
    def balanced(self) -> bool:
        """Whether every issued ticket is in exactly one state."""
        return self.issued == sum(self.states.values())


class Ledger:
    """The counts of one job over all its sites."""

    def __init__(self, redis: Redis, job: JobRef) -> None:
        self._redis = redis
        self._keys = JobKeys(job)

    async def counts(self) -> LedgerCounts:
        """One consistent reading. Raises BrokerLost."""
        with broker.reaching():
            found = await self._redis.hgetall(self._keys.counts)
        numbers = {broker.text(name): int(value) for name, value in found.items()}
        states = dict.fromkeys(("queued", "running", "delivered"), 0)
        states |= {name.removeprefix(_STATE): n for name, n in numbers.items() if name.startswith(_STATE)}
        return LedgerCounts(numbers.get("issued", 0), states)
