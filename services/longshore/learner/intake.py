"""What comes home: deliveries are read, checked against the ledger, and taken in or set aside.

Runs between train steps; what arrives during one waits in the broker, bounded by admission.
"""

from __future__ import annotations

import structlog

from longshore.errors import Rejected
from longshore.learner import metrics
from longshore.learner.broker_link import BrokerLink
from longshore.learner.ledger import Ending, Ledger
from longshore.rollout_queue.rollouts import Delivery, End
from longshore.rpc.convert_rollout import rollout_from_bytes
from longshore.types import JobRef, Rollout, TicketRef

log = structlog.get_logger()

READ_COUNT = 256


class Intake:
    """Reads deliveries into a ledger, for one job."""

    def __init__(self, link: BrokerLink, ledger: Ledger, job: JobRef, vocab_size: int) -> None:
        self._link = link
        self._ledger = ledger
        self._job = job
        self._vocab_size = vocab_size
        self._labels = (job.project, job.job)
        # Deliveries for groups that an earlier incarnation issued after the checkpoint that we started from. Replay
        # issues those groups again, with the same numbers; until then they wait here, bounded by admission.
        self._early: list[Delivery] = []
        # Newest version that exists; a rollout that claims a later one is forged.
        self.newest_version = 0

    async def read(self, block_ms: int) -> int:
        """Takes in what has been delivered. Returns how many entries there were."""
        deliveries = await self._link.read(READ_COUNT, block_ms)
        await self._take(deliveries)
        return len(deliveries)

    async def read_again(self) -> None:
        """Takes in every unacknowledged entry once more, after a restart of the learner or of the broker."""
        await self._take(await self._link.read_pending())

    async def take_early(self) -> None:
        """Takes in what arrived before its group was known; to be called after issuing groups."""
        if self._early:
            early, self._early = self._early, []
            await self._take(early)

    async def _take(self, deliveries: list[Delivery]) -> None:
        repeats = []
        for delivery in deliveries:
            try:
                outcome = self._accept(delivery)
            except Rejected as error:
                log.warning("rollout rejected", ticket=delivery.ticket_key, reason=error.reason, detail=error.detail)
                await self._reject(delivery, error)
                continue
            if outcome is not None:
                metrics.REPEATS.labels(*self._labels).inc()
                repeats.append(End(delivery.entry_id, delivery.ticket_key, outcome))
        if repeats:
            await self._link.acknowledge(repeats)

    def _accept(self, delivery: Delivery) -> str | None:
        try:
            ref = TicketRef.parse(self._job, delivery.ticket_key)
        except ValueError as error:
            raise Rejected("unknown_ticket", str(error)) from None
        if ref.group_id >= self._ledger.next_group:
            # The broker lets nothing through that has no ticket, so this group was issued by an earlier incarnation.
            self._early.append(delivery)
            return None
        if delivery.final_reason is not None:
            return self._ledger.end_ticket(ref.group_id, ref.index, delivery.final_reason, delivery.entry_id)
        if delivery.payload is None:
            raise Rejected("malformed", "an entry with neither rollout nor reason")
        rollout = rollout_from_bytes(delivery.payload)
        self._check(rollout, ref)
        return self._ledger.receive(rollout, delivery.entry_id)

    def _check(self, rollout: Rollout, ref: TicketRef) -> None:
        if rollout.ref != ref:
            raise Rejected("unknown_ticket", f"delivered for {ref.key} but names {rollout.ref.key}")
        if rollout.verdict is None:
            raise Rejected("no_verdict", "a rollout must carry its verdict")
        if rollout.max_version > self.newest_version:
            raise Rejected("versions", f"version {rollout.max_version} does not exist yet")
        if any(not 0 <= token < self._vocab_size for segment in rollout.segments for token in segment.token_ids):
            raise Rejected("token_ids", f"token ids must be below {self._vocab_size}")
        group = self._ledger.open.get(ref.group_id)
        if group is None:
            return
        if ref.index >= group.size:
            raise Rejected("unknown_ticket", f"group {ref.group_id} has only {group.size} tickets")
        if rollout.task_id != group.task.task_id or rollout.purpose is not group.purpose:
            raise Rejected("unknown_ticket", "task or purpose is not the ticket's")

    async def _reject(self, delivery: Delivery, error: Rejected) -> None:
        """The dead-letter script ends the ticket, so the ledger must too; nothing else waits for this entry."""
        await self._link.dead_letter(delivery, error.reason, error.detail)
        try:
            ref = TicketRef.parse(self._job, delivery.ticket_key)
        except ValueError:
            return
        group = self._ledger.open.get(ref.group_id)
        if group is not None and ref.index in group.missing:
            self._ledger.end_ticket(ref.group_id, ref.index, "rejected", delivery.entry_id)


def ends_of(endings: list[Ending]) -> list[End]:
    """Ledger endings as the broker takes them."""
    return [End(ending.entry_id, ending.key, ending.outcome) for ending in endings]
