"""The site's half of a relay: to the site's broker it is what the learner is to the home broker.

    consumes   what the site's actors delivered     waits for     new entries, READ_MS at most
    produces   records in the spool, tickets        unblocked by  actors; the home side taking leases

A rollout is on our disk before it is acknowledged at the site. Works while home is away. Knows brokers by a Protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from longshore.errors import Unavailable
from longshore.relay.book import Book
from longshore.rollout_queue.rollouts import Delivery, End
from longshore.rollout_queue.spool import SpoolFull, SpoolRecord
from longshore.rollout_queue.tickets import FORWARDED, LEASE_LOST
from longshore.rpc.process import wait_or_stop
from longshore.types import Ticket

log = structlog.get_logger()

READ_COUNT = 64
READ_MS = 50
PAUSE_S = 0.25
INCARNATION_CHECK_S = 1.0
# Final reason at home of a rollout that the site's broker gave back damaged.
CORRUPT = "corrupt"


class SiteBroker(Protocol):
    """The site's broker as its relay sees it. Every method raises Unavailable when it is away."""

    async def incarnation(self) -> str: ...
    async def setup(self) -> None: ...
    async def open_epoch(self, at_least: int) -> int: ...
    async def raise_epoch(self, at_least: int) -> int: ...
    async def live(self) -> set[str]: ...
    async def issue(self, epoch: int, tickets: Sequence[Ticket]) -> int: ...
    async def read(self, count: int, block_ms: int) -> list[Delivery]: ...
    async def read_pending(self, after: str, count: int) -> list[Delivery]: ...
    async def acknowledge(self, epoch: int, ends: Sequence[End]) -> None: ...
    async def dead_letter(self, epoch: int, delivery: Delivery, reason: str, detail: str) -> bool: ...
    async def reconcile(self, epoch: int, incarnation: str) -> int: ...


class SiteSide:
    """One relay's dealings with its site's broker."""

    def __init__(
        self,
        site: SiteBroker,
        book: Book,
        on_taken: Callable[[int], None] = lambda number: None,
        on_lost: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._site = site
        self._book = book
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._epoch = 0
        self._incarnation = ""
        self._checked = 0.0
        # Entry after which the pending ones are still to be read; None: they are read.
        self._pending_after: str | None = "0"
        # Whether all that the site had finished when we looked has been taken in.
        self._drained = False
        self._reconciled = False
        # Read, and refused by the spool: they wait here, and nothing more is read.
        self._refused: list[Delivery] = []
        self.prepared = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop`, however long the broker stays away.

        Raises:
            Fenced: another relay has taken over. OSError: the spool's disk failed.
        """
        while not stop.is_set():
            try:
                await self.step()
            except SpoolFull as error:
                log.warning("spool full: the site's rollouts wait", reason=str(error))
                await wait_or_stop(stop, PAUSE_S)
            except Unavailable as error:
                if self._book.site_known:
                    log.warning("site broker away", reason=str(error))
                self._book.site_known = False
                await wait_or_stop(stop, PAUSE_S)

    async def step(self) -> None:
        """One round: look, end, take in, issue. Raises Unavailable, SpoolFull, Fenced."""
        if not self._book.site_known or await self._restarted():
            await self._prepare()
        await self._end_surplus()
        await self._take_in()
        if self._drained and not self._book.spool_full:
            await self._issue()
            await self._reconcile()

    async def _restarted(self) -> bool:
        now = time.monotonic()
        if now - self._checked < INCARNATION_CHECK_S:
            return False
        self._checked = now
        return await self._site.incarnation() != self._incarnation

    async def _prepare(self) -> None:
        """Finds out what the site's broker knows, and tells it what it may have forgotten."""
        book = self._book
        incarnation = await self._site.incarnation()
        await self._site.setup()
        if self._epoch:
            await self._site.raise_epoch(self._epoch)
        else:
            # By the clock, above every earlier life's: the broker may have forgotten which epoch was the last.
            self._epoch = await self._site.open_epoch(int(time.time() * 1000))
        book.at_site = await self._site.live()
        book.surplus &= book.at_site
        if incarnation != self._incarnation:
            log.info("site broker prepared", incarnation=incarnation, epoch=self._epoch, tickets=len(book.at_site))
            self._reconciled = False
        # Spooled, and still out over there: we were killed in between, or the broker lost our acknowledgement.
        await self._end([(None, key) for key in book.at_site if key in book.spool], FORWARDED)
        self._incarnation = incarnation
        self._pending_after = "0"
        self._drained = False
        self._refused = []
        book.spool_full = False
        book.site_known = True
        self.prepared.set()

    async def _end_surplus(self) -> None:
        surplus = [key for key in self._book.surplus if key not in self._book.held]
        if surplus:
            log.warning("leases lost", tickets=len(surplus), first=surplus[0])
            await self._end([(None, key) for key in surplus], LEASE_LOST)
            self._on_lost(len(surplus))

    async def _take_in(self) -> None:
        deliveries = self._refused or await self._read()
        self._refused = []
        if not deliveries:
            return
        whole = [item for item in deliveries if item.payload != b""]
        wanted = [item for item in whole if item.verdict is None and item.ticket_key not in self._book.spool]
        kept = await asyncio.gather(*(self._append(self._record(item)) for item in wanted))
        self._refused = [item for item, is_kept in zip(wanted, kept, strict=True) if not is_kept]
        self._book.spool_full = bool(self._refused)
        refused = {item.entry_id for item in self._refused}
        await self._end([(item.entry_id, item.ticket_key) for item in whole if item.entry_id not in refused], FORWARDED)
        self._on_taken(sum(kept))
        for item in deliveries:
            if item.payload == b"":
                await self._bury(item)
        if self._refused:
            raise SpoolFull(f"{len(self._refused)} rollouts do not fit")

    async def _bury(self, delivery: Delivery) -> None:
        """Sets a rollout aside that the site's broker gave back damaged; home hears that its ticket has ended."""
        key, detail = delivery.ticket_key, "the site's broker gave back other bytes than were delivered"
        if await self._site.dead_letter(self._epoch, delivery, CORRUPT, detail):
            if key not in self._book.spool:
                # Should this not fit, or we die before it, the ticket is attempted again.
                await self._append(SpoolRecord(key, 0, "", b"", CORRUPT, detail))
            self._book.ended_at_site([key])

    async def _read(self) -> list[Delivery]:
        if self._pending_after is not None:
            page = await self._site.read_pending(self._pending_after, READ_COUNT)
            self._pending_after = page[-1].entry_id if page else None
            return page
        found = await self._site.read(READ_COUNT, READ_MS)
        self._drained = self._drained or not found
        return found

    async def _append(self, record: SpoolRecord) -> bool:
        try:
            await self._book.spool.append([record])
        except SpoolFull:
            return False
        self._book.spooled([record.key])
        return True

    def _record(self, delivery: Delivery) -> SpoolRecord:
        key = delivery.ticket_key
        claim = self._book.held.get(key)
        attempt, entry_id = (claim.attempt, claim.entry_id) if claim else (0, "")
        payload, reason = delivery.payload or b"", delivery.final_reason or ""
        return SpoolRecord(key, attempt, entry_id, payload, reason, delivery.detail, delivery.awaiting_verdict)

    async def _end(self, entries: Sequence[tuple[str | None, str]], outcome: str) -> None:
        if entries:
            await self._site.acknowledge(self._epoch, [End(entry, key, outcome) for entry, key in entries])
            self._book.ended_at_site([key for _, key in entries])

    async def _issue(self) -> None:
        tickets = [claim.ticket for claim in self._book.to_issue()]
        if tickets:
            # Noted before: an actor may be done with one before we hear that it is there.
            self._book.at_site.update(ticket.ref.key for ticket in tickets)
            await self._site.issue(self._epoch, tickets)

    async def _reconcile(self) -> None:
        """Once the site's broker knows all that is out, its actors may trust what it says has ended."""
        if not self._reconciled and self._book.home_known:
            await self._site.reconcile(self._epoch, self._incarnation)
            self._reconciled = True
