"""The home half of a relay: to the home broker it is the holder of its site's tickets.

| loop       | consumes                | produces                        | waits for                       |
| `_lease`   | queued tickets          | claims; forgotten spool records | TICK_S; the home broker         |
| `_hand_in` | claims that are spooled | deliveries and rejects at home  | a record; the home broker       |

The link may be down for hours: each call is bounded, and after any failure home is asked anew what it knows of us.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from longshore.errors import Fenced, IntegrityError, LongshoreError, Rejected, Unavailable
from longshore.relay.book import Book
from longshore.rollout_queue.spool import SpoolRecord
from longshore.rollout_queue.tickets import Claim
from longshore.rpc.process import wait_or_stop

log = structlog.get_logger()

TICK_S = 0.1
PAUSE_S = 0.5
# How often home is asked about work of ours on tickets that we do not hold.
SETTLE_S = 1.0
# How often it is asked whether what it has from us is durable there. Each question names every such ticket.
FORGET_S = 15.0
INCARNATION_CHECK_S = 1.0
# How often home is told of what waits in the spool, and how often all leases are renewed, which also tells us what has
# ended there. Both name every ticket in question.
TELL_S = 5.0
RENEW_S = 30.0
# After home had fewer tickets than we wanted.
LEASE_PAUSE_S = 0.5
# While one batch is on the line, the next is read and packed.
SENDERS = 2
BATCH_COUNT = 128
BATCH_BYTES = 4 * 1024 * 1024
# A rollout that comes alone waits for company: each call costs the link some hundred bytes of its own.
GATHER_S = 0.25


class HomeBroker(Protocol):
    """The home broker as a site's relay sees it. Every method raises Unavailable when it is away."""

    async def incarnation(self) -> str: ...
    async def lease(self, count: int) -> list[Claim]: ...
    async def held(self) -> list[Claim]: ...
    async def adopt(self, keys: Sequence[str]) -> list[Claim]: ...
    async def renew(self, claims: Sequence[tuple[Claim, bool]]) -> list[Claim]: ...
    async def reject(self, claim: Claim, reason: str, detail: str) -> None: ...
    async def deliver_many(self, rollouts: Sequence[tuple[Claim, bytes, bool]]) -> list[bool | LongshoreError]: ...
    async def covered(self, ticket_keys: Sequence[str]) -> set[str] | None: ...


class HomeSide:
    """One relay's dealings with the home broker."""

    def __init__(
        self,
        home: HomeBroker,
        book: Book,
        allowance: int,
        renew_s: float = RENEW_S,
        group_size: int = 1,
        on_forwarded: Callable[[str], None] = lambda outcome: None,
        on_leased: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._home = home
        self._book = book
        self._allowance = allowance
        self._renew_s = renew_s
        # A group's tickets share their task, which crosses the link once where they are taken together.
        self._at_once = min(group_size, max(1, allowance // 4))
        # Keys that home knows to be spooled.
        self._told: set[str] = set()
        self._on_forwarded = on_forwarded
        self._on_leased = on_leased
        self._incarnation = ""
        self._next: dict[str, float] = {}
        # Keys that a sender has in hand.
        self._busy: set[str] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop`, however long home stays away. Raises OSError when the spool's disk fails."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lease(stop), name="lease")
            for number in range(SENDERS):
                group.create_task(self._hand_in(stop), name=f"hand-in-{number}")

    # -- leases ----------------------------------------------------------------------------------------------------

    async def _lease(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self.step()
            except Unavailable as error:
                self._away(error)
                await wait_or_stop(stop, PAUSE_S)
            else:
                await wait_or_stop(stop, TICK_S)

    async def step(self) -> None:
        """One round: agree with home on what is ours, take more. Raises Unavailable."""
        if self._due("incarnation", INCARNATION_CHECK_S) or not self._book.home_known:
            await self._agree()
        if self._due("renew", self._renew_s):
            await self._renew(list(self._book.held))
        elif self._due("tell", TELL_S):
            await self._renew([key for key in self._book.held if key in self._book.spool and key not in self._told])
        if self._due("settle", SETTLE_S):
            await self._settle()
        await self._take_more()

    async def _agree(self) -> None:
        incarnation = await self._home.incarnation()
        if incarnation != self._incarnation:
            if self._incarnation:
                log.warning("home broker restarted", incarnation=incarnation)
            self._book.doubt()
        if not self._book.home_known:
            held = await self._home.held()
            # In place of what we thought: a claim that home does not know must not be worked on as if it did.
            self._book.held = {}
            self._book.take(held)
            self._incarnation = incarnation
            self._book.home_known = True
            log.info("home broker reached", held=len(held), spooled=len(self._book.spool.keys()))

    async def _renew(self, keys: Sequence[str]) -> None:
        """Keeps the leases of these, and tells home which of them are spooled."""
        book = self._book
        claims = [(book.held[key], key in book.spool) for key in keys]
        if claims:
            for claim in await self._home.renew(claims):
                # Handed in meanwhile, or really lost: the next round asks.
                book.release(claim)
        told = {claim.ticket.ref.key for claim, spooled in claims if spooled}
        self._told = {key for key in self._told | told if key in book.held}

    async def _settle(self) -> None:
        """Finds out about work of ours on tickets that we do not hold: it is covered, ours after all, or lost."""
        book = self._book
        # With a full spool, what may be forgotten is worth a question at once.
        forgetting = self._due("forget", SETTLE_S if book.spool_full else FORGET_S)
        unclaimed, parked = book.unclaimed, book.parked if forgetting else []
        if not unclaimed and not parked:
            return
        # Asked first: once home has reconciled, a ticket that it then does not give us is not ours.
        covered = await self._home.covered([*unclaimed, *parked])
        ended = covered or set()
        # Whoever had those that are parked may have let go of them.
        adopted = await self._home.adopt([key for key in (*unclaimed, *parked) if key not in ended])
        self._take(adopted)
        if covered is not None:
            book.judge(unclaimed)
            book.forget(ended)

    async def _take_more(self) -> None:
        wanted = self._allowance - len(self._book.held)
        if wanted < self._at_once or not self._book.site_known or self._book.spool_full:
            return
        if self._due("lease", 0.0):
            claims = await self._home.lease(wanted)
            self._take(claims)
            if len(claims) < wanted:
                self._due_in("lease", LEASE_PAUSE_S)

    def _take(self, claims: Sequence[Claim]) -> None:
        self._book.take(claims)
        self._on_leased(len(claims))

    # -- handing in ------------------------------------------------------------------------------------------------

    async def _hand_in(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                if self._book.home_known and await self.hand_in_some():
                    continue
            except Unavailable as error:
                self._away(error)
                await wait_or_stop(stop, PAUSE_S)
            self._book.ready.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._book.ready.wait(), PAUSE_S)
                await wait_or_stop(stop, GATHER_S)

    async def hand_in_some(self) -> int:
        """Hands in one batch of what is spooled and held. Returns its size. Raises Unavailable."""
        batch = self._batch()
        keys = {claim.ticket.ref.key for claim, _ in batch}
        self._busy |= keys
        try:
            await self._hand_in_batch(batch)
        finally:
            self._busy -= keys
        return len(batch)

    def _batch(self) -> list[tuple[Claim, SpoolRecord]]:
        batch: list[tuple[Claim, SpoolRecord]] = []
        size = 0
        for claim in self._book.to_hand_in(self._busy, BATCH_COUNT):
            key = claim.ticket.ref.key
            try:
                record = self._book.spool.load(key)
            except IntegrityError as error:
                # Without its record the ticket is to be attempted again, as one that was never finished.
                log.error("spooled rollout damaged", ticket=key, reason=str(error))
                self._book.spool.forget([key])
                self._book.handed_in(key)
                continue
            batch.append((claim, record))
            size += len(record.payload)
            if size >= BATCH_BYTES:
                break
        return batch

    async def _hand_in_batch(self, batch: Sequence[tuple[Claim, SpoolRecord]]) -> None:
        rollouts = [(claim, record) for claim, record in batch if not record.final_reason]
        sent = [(claim, record.payload, record.awaiting_verdict) for claim, record in rollouts]
        outcomes = await self._home.deliver_many(sent) if sent else []
        refused: Unavailable | None = None
        for (claim, _), outcome in zip(rollouts, outcomes, strict=True):
            if isinstance(outcome, Unavailable):
                refused = outcome
            else:
                await self._settled(claim, outcome)
        for claim, record in batch:
            if record.final_reason:
                await self._home.reject(claim, record.final_reason, record.detail)
                self._done(claim, "notice")
        if refused is not None:
            raise refused

    async def _settled(self, claim: Claim, outcome: bool | LongshoreError) -> None:
        if isinstance(outcome, Rejected):
            await self._home.reject(claim, outcome.reason, outcome.detail)
            self._done(claim, "rejected")
        elif isinstance(outcome, Fenced):
            log.info("rollout is not taken", reason=str(outcome))
            self._done(claim, "fenced")
        elif isinstance(outcome, LongshoreError):
            raise outcome
        else:
            self._done(claim, "delivered" if outcome else "repeated")

    def _done(self, claim: Claim, outcome: str) -> None:
        self._book.release(claim)
        self._book.handed_in(claim.ticket.ref.key)
        self._on_forwarded(outcome)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _away(self, error: Unavailable) -> None:
        if self._book.home_known:
            log.warning("home broker away", reason=str(error))
        # A reply may have been lost with the connection: `held` says what became of it.
        self._book.home_known = False

    def _due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + every_s
        return True

    def _due_in(self, what: str, seconds: float) -> None:
        self._next[what] = time.monotonic() + seconds
