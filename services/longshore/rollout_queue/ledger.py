"""The broker's counts of a job's tickets: issued = sum of the states, at any moment. Reads only."""

from __future__ import annotations

from dataclasses import dataclass, field

from redis.asyncio import Redis

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.tickets import LIVE_STATES
from longshore.types import JobRef

_STATE = "state:"


@dataclass(frozen=True)
class LedgerCounts:
    """Example: LedgerCounts(issued=96, states={"queued": 30, "running": 2, ..., "trained": 64},
    by_site={"home": {"queued": 30, "trained": 40}, "west": {"running": 2, "trained": 24}}, bytes_waiting=0)

    In `states` the live states are always there; final reasons once a ticket has ended so. `by_site` holds what is not
    zero. `bytes_waiting` counts what the rollouts not yet acknowledged take on the broker.
    """

    issued: int
    states: dict[str, int]
    by_site: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes_waiting: int = 0

    @property
    def imbalance(self) -> int:
        """Tickets issued that are in no state; negative: tickets that are in two. Anything but 0 is a fault."""
        return self.issued - sum(self.states.values())

    @property
    def balanced(self) -> bool:
        """Whether every issued ticket is in exactly one state."""
        return self.imbalance == 0


class Ledger:
    """The counts of one job at the broker of one site; the home site's are those of the whole job."""

    def __init__(self, redis: Redis, job: JobRef, site: str = "home") -> None:
        self._redis = redis
        self._keys = JobKeys(job, site)

    async def counts(self) -> LedgerCounts:
        """One consistent reading. Raises BrokerLost."""
        with broker.reaching():
            found = await self._redis.hgetall(self._keys.counts)
        numbers = {broker.text(name): int(value) for name, value in found.items()}
        states = dict.fromkeys(LIVE_STATES, 0)
        by_site: dict[str, dict[str, int]] = {}
        for name, number in sorted(numbers.items()):
            if name.startswith(_STATE):
                state, _, site = name.removeprefix(_STATE).partition("@")
                states[state] = states.get(state, 0) + number
                if number:
                    by_site.setdefault(site, {})[state] = number
        return LedgerCounts(numbers.get("issued", 0), states, by_site, numbers.get("bytes", 0))
