"""A job on two sites for tests of the relay's halves: real queues on one broker, and every kind of bad luck.

The home queue and the site's are apart by their keys, so each can lose its tail alone: what it held at an earlier
moment is put back, and its incarnation changes. Learner and actors are played by the test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from longshore.errors import Fenced, Unavailable
from longshore.relay.book import Book
from longshore.relay.brokers import HomeQueues, SiteQueues
from longshore.relay.home_side import HomeSide
from longshore.relay.site_side import SiteSide
from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.rollouts import Delivery, End, RolloutQueue
from longshore.rollout_queue.site_leases import expire
from longshore.rollout_queue.spool import Spool
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.types import JobRef, Ticket

SITE = "west"
MIB = 1024 * 1024


class Flaky:
    """Stands before a broker: `down` refuses every call; `lost_replies` lets that many happen, and says otherwise."""

    def __init__(self, inner: Any, incarnation: Callable[[], str]) -> None:
        self._inner = inner
        self._incarnation = incarnation
        self.down = False
        self.lost_replies = 0

    async def incarnation(self) -> str:
        self._check()
        return self._incarnation()

    async def reconcile(self, epoch: int, incarnation: str) -> int:
        """The site's; the server's own name for itself stays the same here, see `Tier`."""
        self._check()
        if incarnation != self._incarnation():
            raise Unavailable("the broker has restarted")
        return int(await self._inner.reconcile(epoch, await self._inner.incarnation()))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def call(*args: Any) -> Any:
            self._check()
            reply = await method(*args)
            if self.lost_replies:
                self.lost_replies -= 1
                raise Unavailable("the reply got lost")
            return reply

        return call

    def _check(self) -> None:
        if self.down:
            raise Unavailable("down")


class Tier:
    """One broker's part of the job: its keys, which can be put back to an earlier state."""

    def __init__(self, redis: Redis, job: JobRef, site: str) -> None:
        self.redis = redis
        self.keys = JobKeys(job, site)
        self.restarts = 0
        self._saved: dict[bytes, bytes] = {}

    @property
    def incarnation(self) -> str:
        return f"run-{self.restarts}"

    async def save(self) -> None:
        """What has reached the disk."""
        names = [name async for name in self.redis.scan_iter(match=f"{self._prefix}*", count=1000)]
        self._saved = {name: await self.redis.dump(name) for name in names}

    async def lose_tail(self) -> None:
        """A restart that lost everything since `save`."""
        async for name in self.redis.scan_iter(match=f"{self._prefix}*", count=1000):
            await self.redis.delete(name)
        for name, value in self._saved.items():
            await self.redis.restore(name, 0, value)
        # The functions compare the server's run id, which stays the same here.
        await self.redis.delete(self.keys.reconciled)
        self.restarts += 1

    @property
    def _prefix(self) -> str:
        return self.keys.tickets.removesuffix("tickets").replace("[", "\\[")


class World:
    """One job, its learner, a home actor, and the site `west` with a relay that can be killed."""

    def __init__(self, redis: Redis, job: JobRef, folder: Path, make_ticket: Callable[[int], Ticket]) -> None:
        self.job = job
        self.redis = redis
        self.folder = folder
        self._make_ticket = make_ticket
        self.home, self.west = Tier(redis, job, "home"), Tier(redis, job, SITE)
        self.home_tickets, self.home_rollouts = TicketQueue(redis, job), RolloutQueue(redis, job)
        self.site_tickets, self.site_rollouts = TicketQueue(redis, job, SITE), RolloutQueue(redis, job, SITE)
        self.epoch = 0
        # The learner's durable memory.
        self.out: dict[str, Ticket] = {}
        self.ended: dict[str, str] = {}
        self.payloads: dict[str, bytes] = {}
        self.repeats = 0
        self._read: dict[str, Delivery] = {}
        self.spool_bytes = 64 * MIB
        self.site_claims: list[Claim] = []
        self.home_claims: list[Claim] = []
        self._made = 0

    async def open(self) -> None:
        await self.home_tickets.setup()
        await self.site_tickets.setup()
        self.epoch = await self.home_tickets.open_epoch()
        await self.home_rollouts.reconcile(self.epoch, await broker.incarnation(self.redis), {})
        self.start_relay()
        await self.home.save()
        await self.west.save()

    # -- relay -----------------------------------------------------------------------------------------------------

    def start_relay(self, allowance: int = 8) -> None:
        """A new life of the relay, with what the last one left on the disk."""
        self.spool = Spool.open(self.folder, self.spool_bytes)
        self.book = Book(self.spool)
        site = SiteQueues(self.redis, self.job, SITE, None)
        home = HomeQueues(self.redis, self.job, SITE, max_attempts=50, lease_ms=3_600_000, blobs=None)
        self.to_site = Flaky(site, lambda: self.west.incarnation)
        self.to_home = Flaky(home, lambda: self.home.incarnation)
        self.site_side = SiteSide(self.to_site, self.book)
        self.home_side = HomeSide(self.to_home, self.book, allowance, renew_s=0.0)

    def kill_relay(self) -> None:
        down, up = self.to_home.down, self.to_site.down
        self.spool.close()
        self.start_relay()
        self.to_home.down, self.to_site.down = down, up

    async def site_step(self) -> None:
        try:
            await self.site_side.step()
        except Unavailable:
            self.book.site_known = False

    async def home_step(self) -> None:
        try:
            await self.home_side.step()
        except Unavailable:
            self.book.home_known = False

    async def hand_in(self) -> None:
        try:
            if self.book.home_known:
                await self.home_side.hand_in_some()
        except Unavailable:
            self.book.home_known = False

    # -- the others ------------------------------------------------------------------------------------------------

    async def issue(self, count: int) -> None:
        tickets = [self._make_ticket(len(self.out) + number) for number in range(count)]
        self.out.update({ticket.ref.key: ticket for ticket in tickets})
        await self.home_tickets.issue(self.epoch, tickets)

    async def site_claims_some(self, count: int = 3) -> None:
        self.site_claims += await self.site_tickets.claim("actor-w", count, 0)

    async def site_actors_die(self) -> None:
        self.site_claims = await self.site_tickets.take_over("actor-x", 100, 0)

    async def site_delivers(self, count: int = 2) -> None:
        for _ in range(min(count, len(self.site_claims))):
            await self._deliver(self.site_rollouts, self.site_claims.pop(0), "west")

    async def site_rejects(self) -> None:
        if self.site_claims:
            await self.site_tickets.reject(self.site_claims.pop(0), "prompt", "too long")

    async def home_claims_one(self) -> None:
        self.home_claims += await self.home_tickets.claim("actor-h", 1, 0)

    async def home_delivers(self) -> None:
        if self.home_claims:
            await self._deliver(self.home_rollouts, self.home_claims.pop(0), "home")

    async def _deliver(self, queue: RolloutQueue, claim: Claim, where: str) -> None:
        self._made += 1
        key = claim.ticket.ref.key
        with contextlib.suppress(Fenced):
            await queue.deliver(claim, f"{key} by {where} number {self._made}".encode())

    async def expire(self) -> None:
        """Every site lease runs out."""
        await expire(self.redis, self.job, 0, max_attempts=50)

    async def learner_reads(self) -> None:
        await self._take(await self.home_rollouts.read(100, 0))

    async def _take(self, deliveries: Sequence[Delivery]) -> None:
        for item in deliveries:
            if item.ticket_key in self._read or item.ticket_key in self.ended:
                self.repeats += 1
            else:
                self._read[item.ticket_key] = item

    async def learner_checkpoints(self) -> None:
        ends = []
        for key, item in self._read.items():
            self.ended[key] = "trained" if item.payload is not None else str(item.final_reason)
            self.payloads[key] = item.payload or b""
            ends.append(End(item.entry_id, key, self.ended[key]))
        self._read.clear()
        await self.home_rollouts.acknowledge(self.epoch, ends)

    async def home_loses_tail(self) -> None:
        await self.home.lose_tail()
        self.home_claims.clear()

    async def learner_reconciles(self) -> None:
        """What a learner does once it has noticed that the home broker restarted."""
        await self.home_tickets.setup()
        await self.home_tickets.raise_epoch(self.epoch)
        self._read.clear()
        await self.home_rollouts.acknowledge(self.epoch, [End(None, key, why) for key, why in self.ended.items()])
        await self._take(await self.home_rollouts.read_pending())
        open_ = [ticket for key, ticket in self.out.items() if key not in self.ended]
        await self.home_tickets.issue(self.epoch, open_)
        await self.learner_checkpoints()
        finals: dict[tuple[str, str], int] = {}
        for why in self.ended.values():
            finals["home", why] = finals.get(("home", why), 0) + 1
        await self.home_rollouts.reconcile(self.epoch, await broker.incarnation(self.redis), finals)

    async def site_loses_tail(self) -> None:
        await self.west.lose_tail()
        await self.site_tickets.setup()

    async def finish(self) -> None:
        """Heals everything, and plays on until each ticket has ended and the site is clean."""
        self.to_home.down = self.to_site.down = False
        self.to_home.lost_replies = self.to_site.lost_replies = 0
        await self.learner_reconciles()
        for _ in range(60):
            for act in (self.site_step, self.home_step, self.site_actors_die, self.site_claims_some):
                await act()
            await self.site_delivers(100)
            self.home_claims = await self.home_tickets.take_over("actor-h", 100, 0)
            while self.home_claims:
                await self.home_delivers()
            for act in (self.site_step, self.site_step, self.hand_in, self.hand_in):
                await act()
            await self.learner_reads()
            await self.learner_checkpoints()
            if len(self.ended) == len(self.out) and not self.spool.keys() and not await self.to_site.live():
                return
        raise AssertionError(f"not at rest: {await self.told()}")

    async def told(self) -> dict[str, object]:
        """What everybody thinks, for a failed test's message."""
        return {
            "missing": sorted(set(self.out) - set(self.ended)),
            "home": await Ledger(self.redis, self.job).counts(),
            "west": await Ledger(self.redis, self.job, SITE).counts(),
            "held": sorted(self.book.held),
            "at_site": sorted(self.book.at_site),
            "judged": sorted(self.book.judged),
            "surplus": sorted(self.book.surplus),
            "spool": self.spool.keys(),
        }
