"""The learner's way to the broker: every call survives a broker that restarts, with or without its last second.

Each call is idempotent on the broker, so a failed one is simply made again after `_recover`. A new incarnation may
have lost the tail of what it was told; `lost_tail` says so, until the owner has said again what it knows (law 3).
A broker whose memory is full is not waited for: what would free it is the owner's to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import structlog
from redis.asyncio import Redis

from longshore.errors import Fenced, Interrupted, LongshoreError, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.broker import BrokerFull
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.ledger import Ledger, LedgerCounts
from longshore.rollout_queue.rollouts import Delivery, End, RolloutQueue
from longshore.rollout_queue.site_leases import expire
from longshore.rollout_queue.tickets import TicketQueue
from longshore.types import JobRef, Ticket

log = structlog.get_logger()

T = TypeVar("T")
# How long the broker, or the object storage, may be away before the learner gives up; the launcher restarts it then.
PATIENCE_S = 120.0
PAUSE_S = 0.25
INCARNATION_CHECK_S = 1.0
COMMAND_POLL_S = 1.0
# Events that wait for room on the broker.
MAX_UNSAID = 1000


class Cancelled(LongshoreError):
    """The job's owner cancelled it."""


class BrokerLink:
    """Tickets out, rollouts in, events and commands, for one job and one learner epoch."""

    def __init__(
        self,
        client: Redis,
        job: JobRef,
        site: str,
        max_attempts: int,
        site_lease_s: float,
        *,
        blobs: Blobs | None = None,
    ) -> None:
        self._redis = client
        self._job = job
        self._max_attempts = max_attempts
        self._site_lease_ms = int(site_lease_s * 1000)
        self._tickets = TicketQueue(client, job, site, max_attempts=max_attempts)
        self._rollouts = RolloutQueue(client, job, site, blobs=blobs)
        self._channel = JobChannel(client, job)
        self._ledger = Ledger(client, job, site)
        self._incarnation = ""
        self._checked = 0.0
        self._asked = 0.0
        self._unsaid: deque[dict[str, object]] = deque(maxlen=MAX_UNSAID)
        self.epoch = 0
        # Whether the broker has restarted since it was last told everything.
        self.lost_tail = False

    async def open(self, at_least: int) -> int:
        """Prepares the job's streams and takes a new epoch, above every earlier one. Returns the epoch."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                await self._tickets.setup()
                self._incarnation = await broker.incarnation(self._redis)
                self.epoch = await self._tickets.open_epoch(at_least=at_least)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(PAUSE_S)
            else:
                return self.epoch

    async def confirm(self) -> None:
        """Raises Fenced when a newer epoch is open, as far as that can be told: the broker may be away."""
        current = self.epoch
        with contextlib.suppress(Unavailable):
            current = await self._tickets.raise_epoch(self.epoch)
        if current > self.epoch:
            raise Fenced(f"learner epoch {self.epoch} has been superseded by {current}")

    async def issue(self, tickets: Sequence[Ticket]) -> None:
        """Makes tickets claimable; those the broker knows already are left as they are. Raises Fenced, BrokerFull."""
        await self._call(lambda: self._tickets.issue(self.epoch, tickets))

    async def read(self, count: int, block_ms: int) -> list[Delivery]:
        """Deliveries not read before; empty when none came within `block_ms`."""
        await self.notice_restart()
        return await self._call(lambda: self._rollouts.read(count, block_ms))

    async def read_pending(self, after: str) -> list[Delivery]:
        """A page of the deliveries that were read and not yet acknowledged, oldest first, behind the entry `after`."""
        return await self._call(lambda: self._rollouts.read_pending(after=after))

    async def acknowledge(self, ends: Sequence[End]) -> None:
        """Tells the broker how tickets ended, so that it may forget them. Raises Fenced."""
        await self._call(lambda: self._rollouts.acknowledge(self.epoch, ends))

    async def dead_letter(self, delivery: Delivery, reason: str, detail: str, task: bytes) -> bool:
        """Sets a delivery aside that failed validation. Returns whether its ticket has ended with it."""
        return await self._call(lambda: self._rollouts.dead_letter(self.epoch, delivery, reason, detail, task))

    @property
    def incarnation(self) -> str:
        """The broker's, as far as we have noticed."""
        return self._incarnation

    async def reconcile(self, told: str, finals: Mapping[tuple[str, str], int]) -> None:
        """Makes the broker's counts anew and lets the sites forget what has ended.

        To be called when everything that ended is durable. It changes nothing when the broker is no longer `told`: the
        incarnation that all that is out has been said to.
        """
        try:
            if not self.lost_tail:
                await self._rollouts.reconcile(self.epoch, told, finals)
        except Unavailable as error:
            # Not made again here: the broker that comes back has to be told everything first.
            log.warning("not reconciled", reason=str(error))
            self.lost_tail = True

    async def counts(self) -> LedgerCounts:
        """The broker's own account of the job's tickets."""
        return await self._call(self._ledger.counts)

    async def expire_site_leases(self) -> int:
        """Puts tickets whose site lease ran out back into the queue. Returns how many."""
        return await self._call(
            lambda: expire(self._redis, self._job, self._site_lease_ms, max_attempts=self._max_attempts)
        )

    async def wishes(self) -> list[tuple[str, bytes]]:
        """(id, serialised task) of the dead letters that people want attempted again."""
        return await self._call(self._channel.requeues)

    async def drop_wishes(self, ids: Sequence[str]) -> None:
        """Forgets wishes that have been fulfilled, durably."""
        await self._call(lambda: self._channel.drop_requeues(ids))

    async def close(self, reason: str) -> None:
        """Ends every ticket that is still out, and with it the job's claim on the actors."""
        await self._call(lambda: self._tickets.close(self.epoch, reason))

    async def publish(self, event: dict[str, object]) -> None:
        """Tells whoever watches. While the broker is full, events wait here, and the oldest are dropped."""
        self._unsaid.append(event)
        try:
            while self._unsaid:
                oldest = self._unsaid[0]
                await self._call(lambda: self._channel.publish(oldest))  # noqa: B023 - awaited at once
                if self._unsaid and self._unsaid[0] is oldest:
                    self._unsaid.popleft()
        except BrokerFull as error:
            log.warning("event waits", reason=str(error))

    async def pending_command(self) -> str | None:
        return await self._call(self._channel.pending_command)

    async def check_orders(self, stop: asyncio.Event) -> None:
        """Raises Interrupted when this process, Cancelled when this job is told to end."""
        if stop.is_set():
            raise Interrupted("told to stop before the job's end; it goes on from its last checkpoint")
        now = time.monotonic()
        if now - self._asked < COMMAND_POLL_S:
            return
        self._asked = now
        if await self.pending_command() == "cancel":
            raise Cancelled("cancelled by its owner")

    async def _call(self, operation: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await operation()
            except BrokerFull:
                raise
            except Unavailable as error:
                log.warning("broker unavailable", reason=str(error))
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(PAUSE_S)
                await self._recover()

    async def notice_restart(self) -> None:
        """Looks now and then whether the broker has restarted; see `lost_tail`."""
        now = time.monotonic()
        if now - self._checked < INCARNATION_CHECK_S:
            return
        self._checked = now
        if await self._call(lambda: broker.incarnation(self._redis)) != self._incarnation:
            await self._recover()

    async def _recover(self) -> None:
        """Waits until the broker answers, and prepares it where it has restarted."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                incarnation = await broker.incarnation(self._redis)
                await self._tickets.setup()
                await self._tickets.raise_epoch(self.epoch)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(PAUSE_S)
            else:
                break
        if incarnation != self._incarnation:
            log.warning("broker restarted", incarnation=incarnation)
            self._incarnation = incarnation
            self.lost_tail = True
