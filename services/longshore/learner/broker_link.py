"""The learner's way to the broker: every call survives a broker that restarts, with or without its last second.

Each call is idempotent on the broker, so a failed one is simply made again after `_recover`. A new incarnation may
have lost the tail of what it was told; then `on_loss` runs: the owner says again what it knows (law 3).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import structlog
from redis.asyncio import Redis

from longshore.errors import Interrupted, LongshoreError, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.rollouts import Delivery, End, RolloutQueue
from longshore.rollout_queue.tickets import TicketQueue
from longshore.types import JobRef, Ticket

log = structlog.get_logger()

T = TypeVar("T")
# How long the broker may be away before the learner gives up; the launcher then restarts the learner.
PATIENCE_S = 120.0
PAUSE_S = 0.25
INCARNATION_CHECK_S = 1.0
COMMAND_POLL_S = 1.0


class Cancelled(LongshoreError):
    """The job's owner cancelled it."""


class BrokerLink:
    """Tickets out, rollouts in, events and commands, for one job and one learner epoch."""

    def __init__(self, client: Redis, job: JobRef, site: str, max_attempts: int) -> None:
        self._redis = client
        self._tickets = TicketQueue(client, job, site, max_attempts=max_attempts)
        self._rollouts = RolloutQueue(client, job, site)
        self._channel = JobChannel(client, job)
        self._incarnation = ""
        self._checked = 0.0
        self._asked = 0.0
        self.epoch = 0
        self.on_loss: Callable[[], Awaitable[None]] | None = None

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

    async def issue(self, tickets: Sequence[Ticket]) -> None:
        """Makes tickets claimable; those the broker knows already are left as they are. Raises Fenced."""
        await self._call(lambda: self._tickets.issue(self.epoch, tickets))

    async def read(self, count: int, block_ms: int) -> list[Delivery]:
        """Deliveries not read before; empty when none came within `block_ms`."""
        await self._check_incarnation()
        return await self._call(lambda: self._rollouts.read(count, block_ms))

    async def read_pending(self) -> list[Delivery]:
        """Every delivery that was read and not yet acknowledged, oldest first."""
        found: list[Delivery] = []
        after = "0"
        while page := await self._page(after):
            found.extend(page)
            after = page[-1].entry_id
        return found

    async def _page(self, after: str) -> list[Delivery]:
        return await self._call(lambda: self._rollouts.read_pending(after=after))

    async def acknowledge(self, ends: Sequence[End]) -> None:
        """Tells the broker how tickets ended, so that it may forget them. Raises Fenced."""
        await self._call(lambda: self._rollouts.acknowledge(self.epoch, ends))

    async def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        """Sets a delivery aside that failed validation; its ticket ends as rejected."""
        await self._call(lambda: self._rollouts.dead_letter(self.epoch, delivery, reason, detail))

    async def close(self, reason: str) -> None:
        """Ends every ticket that is still out, and with it the job's claim on the actors."""
        await self._call(lambda: self._tickets.close(self.epoch, reason))

    async def publish(self, event: dict[str, object]) -> None:
        await self._call(lambda: self._channel.publish(event))

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
        while True:
            try:
                return await operation()
            except Unavailable as error:
                log.warning("broker unavailable", reason=str(error))
                await self._recover()

    async def _check_incarnation(self) -> None:
        now = time.monotonic()
        if now - self._checked < INCARNATION_CHECK_S:
            return
        self._checked = now
        if await self._call(lambda: broker.incarnation(self._redis)) != self._incarnation:
            await self._recover()

    async def _recover(self) -> None:
        """Waits until the broker answers; after a restart, says again what it may have lost."""
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
            if self.on_loss is not None:
                await self.on_loss()
