"""The two brokers as the relay's halves see them, over the queue's own classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from redis.asyncio import Redis

from longshore.errors import ConfigError, LongshoreError, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.rollouts import Delivery, End, RolloutQueue
from longshore.rollout_queue.site_leases import SiteLeases
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.types import JobRef, Ticket


class SiteQueues:
    """The site's broker."""

    def __init__(self, client: Redis, job: JobRef, site: str, blobs: Blobs | None) -> None:
        self._redis = client
        self._keys = JobKeys(job, site)
        self._tickets = TicketQueue(client, job, site)
        self._rollouts = RolloutQueue(client, job, site, blobs=blobs)

    async def incarnation(self) -> str:
        return await broker.incarnation(self._redis)

    async def setup(self) -> None:
        await self._tickets.setup()

    async def open_epoch(self, at_least: int) -> int:
        return await self._tickets.open_epoch(at_least)

    async def raise_epoch(self, at_least: int) -> int:
        return await self._tickets.raise_epoch(at_least)

    async def live(self) -> set[str]:
        """Keys of the tickets that have not ended at this broker."""
        with broker.reaching():
            found = await self._redis.hkeys(self._keys.live)
        return {broker.text(key) for key in found}

    async def issue(self, epoch: int, tickets: Sequence[Ticket]) -> int:
        return await self._tickets.issue(epoch, tickets)

    async def read(self, count: int, block_ms: int) -> list[Delivery]:
        return await self._rollouts.read(count, block_ms)

    async def read_pending(self, after: str, count: int) -> list[Delivery]:
        return await self._rollouts.read_pending(after, count)

    async def acknowledge(self, epoch: int, ends: Sequence[End]) -> None:
        await self._rollouts.acknowledge(epoch, ends)

    async def dead_letter(self, epoch: int, delivery: Delivery, reason: str, detail: str) -> bool:
        return await self._rollouts.dead_letter(epoch, delivery, reason, detail)

    async def reconcile(self, epoch: int, incarnation: str) -> int:
        return await self._rollouts.reconcile(epoch, incarnation, None)


class HomeQueues:
    """The home broker, as the holder of a site's tickets sees it.

    One that refuses our credential is away like any other: it may have restarted and not have been told of us yet, and
    what this site has spooled outlasts the time until somebody renews the credential.
    """

    def __init__(
        self, client: Redis, job: JobRef, site: str, *, max_attempts: int, lease_ms: int, blobs: Blobs | None
    ) -> None:
        self._redis = client
        self._keys = JobKeys(job)
        self._leases = SiteLeases(client, job, site, max_attempts=max_attempts, lease_ms=lease_ms)
        self._rollouts = RolloutQueue(client, job, blobs=blobs, maker=site)

    async def incarnation(self) -> str:
        with _refused_for_now():
            return broker.text(await broker.call(self._redis, self._keys, "incarnation"))

    async def lease(self, count: int) -> list[Claim]:
        with _refused_for_now():
            return await self._leases.lease(count)

    async def held(self) -> list[Claim]:
        with _refused_for_now():
            return await self._leases.held()

    async def adopt(self, keys: Sequence[str]) -> list[Claim]:
        with _refused_for_now():
            return await self._leases.adopt(keys)

    async def renew(self, claims: Sequence[tuple[Claim, bool]]) -> list[Claim]:
        with _refused_for_now():
            return await self._leases.renew(claims)

    async def reject(self, claim: Claim, reason: str, detail: str) -> None:
        with _refused_for_now():
            await self._leases.reject(claim, reason, detail)

    async def deliver_many(self, rollouts: Sequence[tuple[Claim, bytes, bool]]) -> list[bool | LongshoreError]:
        with _refused_for_now():
            return await self._rollouts.deliver_many(rollouts)

    async def covered(self, ticket_keys: Sequence[str]) -> set[str] | None:
        with _refused_for_now():
            return await self._rollouts.covered(ticket_keys)


@contextlib.contextmanager
def _refused_for_now() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        # A site may not load functions: those of this version are home's learner's to bring.
        hint = " (has home's learner started, and is it of our version?)" if "function|load" in str(error) else ""
        raise Unavailable(f"home: {error}{hint}") from None
