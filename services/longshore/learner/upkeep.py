"""What a learner does now and then beside its training: keeps the broker's books and its own equal, and says so.

    after a broker's restart   everything that is out is said again; then a checkpoint at once, and the counts anew
    every few seconds          the equation of the ledger is checked, and site leases that ran out go back
    too many bytes waiting     a checkpoint before its turn

Called between train steps and from the waits of the learner's loop, so it never runs beside a train step.
"""

from __future__ import annotations

import time

import structlog

from longshore.learner import metrics
from longshore.learner.durability import Durability
from longshore.learner.issuer import Issuer
from longshore.learner.parts import Parts
from longshore.rollout_queue.ledger import LedgerCounts
from longshore.rollout_queue.tickets import MAX_QUEUE_BYTES

log = structlog.get_logger()

EVERY_S = 5.0
RESEND_S = 1.0
# A count that is off while a call is on its way is right at the next look.
LOOKS = 2
# Times that counts which are off after a restart are made anew before that is called a fault: a notice that was not
# read yet when they were made is missing in them.
MENDS = 3


class Upkeep:
    """The upkeep of one learner incarnation."""

    def __init__(self, parts: Parts, issuer: Issuer, durability: Durability) -> None:
        self._parts = parts
        self._issuer = issuer
        self._durability = durability
        self._labels = (parts.job.project, parts.job.job)
        self._looked = self._resent = time.monotonic()
        self._off = 0
        self._mends_left = 0
        self._warned = False

    async def begin(self) -> None:
        """At a learner's start: takes in what is unacknowledged, says again what is out, makes the counts anew."""
        await self._parts.intake.read_again()
        told = self._parts.link.incarnation
        await self._issuer.say_again()
        if self._issuer.all_sent:
            # All that has ended is in the checkpoint that we started from.
            await self._durability.reconcile(told)
            self._mends_left = MENDS
        else:
            self._parts.link.lost_tail = True

    async def end(self) -> None:
        """When every ticket has ended: leaves a broker that lost something with the right counts."""
        if self._parts.link.lost_tail:
            self._parts.link.lost_tail = False
            await self._durability.checkpoint(told=self._parts.link.incarnation)
            await self._durability.settled()

    async def run(self) -> None:
        """Does what is due."""
        await self._parts.link.notice_restart()
        now = time.monotonic()
        if now - self._resent >= RESEND_S:
            self._resent = now
            await self._issuer.resend()
            if self._parts.link.lost_tail:
                await self._recover()
        if now - self._looked >= EVERY_S:
            self._looked = now
            await self._parts.link.expire_site_leases()
            await self._look()
        elif self._durability.overdue:
            await self._checkpoint_early("rollouts that no checkpoint contains")

    async def _recover(self) -> None:
        """After a restart of the broker, which may have lost the last second."""
        # First: a restart that comes from here on is another one.
        self._parts.link.lost_tail = False
        await self._make_anew()
        self._mends_left = MENDS

    async def _make_anew(self) -> None:
        told = self._parts.link.incarnation
        await self._issuer.say_again()
        if not self._issuer.all_sent:
            # The broker has no room for tickets: what a checkpoint frees comes first, and all of this again then.
            self._parts.link.lost_tail, told = True, ""
        await self._durability.checkpoint(told)

    async def _look(self) -> None:
        counts = await self._parts.link.counts()
        await self._check(counts)
        metrics.AWAITING.labels(*self._labels).set(self._parts.ledger.num_awaiting)
        if counts.bytes_waiting > MAX_QUEUE_BYTES // 2 and self._durability.anything_waits:
            # Actors get nothing more from a broker that is full.
            await self._checkpoint_early("bytes on the broker")

    async def _checkpoint_early(self, why: str) -> None:
        log.info("checkpoint before its turn", because=why, bytes=self._durability.waiting_bytes)
        await self._durability.checkpoint()

    async def _check(self, counts: LedgerCounts) -> None:
        """Law 3: every ticket issued is in exactly one state, and the broker knows of as many as we."""
        if self._parts.link.lost_tail or not self._issuer.all_sent:
            # The broker has not been told everything: it cannot know as much.
            return
        ledger = self._parts.ledger
        difference = counts.issued - ledger.issued
        metrics.IMBALANCE.labels(*self._labels, "broker").set(counts.imbalance)
        metrics.IMBALANCE.labels(*self._labels, "learner").set(difference)
        if not counts.imbalance and not difference and ledger.balanced:
            self._off = self._mends_left = 0
            self._warned = False
            return
        self._off += 1
        if self._off < LOOKS:
            return
        if self._mends_left:
            self._mends_left -= 1
            await self._make_anew()
        elif not self._warned:
            self._warned = True
            await self._parts.reporter.warn(
                f"the ledger does not add up: {counts.issued} tickets issued, {sum(counts.states.values())} in the "
                f"broker's states, {ledger.issued} in the learner's books; see `longshore ledger {self._parts.job.job}`"
            )
