"""Looking after spooled rollouts until the learner's durable checkpoint contains them.

    consumes   spooled records        waits for       SWEEP_S; the broker
    produces   repeated deliveries,   unblocked by    the learner's acknowledgements; the broker's return
               free space

A broker that comes back may have lost its last second. It is known by its incarnation: then everything that is spooled
is delivered again, which is harmless where nothing was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from longshore.errors import Fenced, IntegrityError, LongshoreError, NotFound, Unavailable
from longshore.rollout_queue.spool import Spool, SpoolRecord
from longshore.rollout_queue.tickets import Claim
from longshore.types import JobRef, Purpose, Sampling, Task, Ticket, TicketRef

log = structlog.get_logger()

SWEEP_S = 2.0
# Records read from the disk for one call of the broker.
_BATCH_COUNT = 64
_BATCH_BYTES = 16 * 1024 * 1024


class Deliveries(Protocol):
    """What a sweeper needs of rollout_queue.RolloutQueue."""

    async def deliver_many(self, rollouts: Sequence[tuple[Claim, bytes, bool]]) -> list[bool | LongshoreError]: ...
    async def covered(self, ticket_keys: Sequence[str]) -> set[str] | None: ...


class SweepObserver(Protocol):
    """Told what the spool holds and how repeated deliveries went, for metrics."""

    def spool_holds(self, records: int, size: int) -> None: ...
    def redelivered(self, outcome: str) -> None: ...


class Sweeper:
    """Looks after one actor's spool.

    Args:
        incarnation: names the broker's present life.
    """

    def __init__(
        self,
        job: JobRef,
        spool: Spool,
        rollouts: Deliveries,
        incarnation: Callable[[], Awaitable[str]],
        observer: SweepObserver,
    ) -> None:
        self._job = job
        self._spool = spool
        self._rollouts = rollouts
        self._incarnation = incarnation
        self._observer = observer
        self._known_incarnation = ""
        # Keys that this incarnation may not know, oldest first.
        self._again: dict[str, None] = {}

    async def run(self) -> None:
        """Sweeps until it is cancelled, however long the broker stays away."""
        while True:
            try:
                await self.sweep()
            except Unavailable as error:
                log.info("spooled rollouts wait", rollouts=len(self._spool.keys()), reason=str(error))
            await asyncio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """One look: forgets what is covered, delivers again what a restarted broker may have lost.

        Raises:
            Unavailable: the broker is away or full.
        """
        keys = self._spool.keys()
        self._observer.spool_holds(len(keys), self._spool.used_bytes)
        if not keys:
            return
        incarnation = await self._incarnation()
        if incarnation != self._known_incarnation:
            log.info("delivering again", rollouts=len(keys), incarnation=incarnation)
            self._again.update(dict.fromkeys(keys))
            self._known_incarnation = incarnation
        covered = await self._rollouts.covered(keys)
        self._forget(covered or set())
        await self._deliver_again(reconciled=covered is not None)

    async def _deliver_again(self, *, reconciled: bool) -> None:
        left = list(self._again)
        while left:
            records, left = self._load(left)
            rollouts = [(_claim(self._job, item), item.payload, item.awaiting_verdict) for item in records]
            outcomes = await self._rollouts.deliver_many(rollouts)
            for record, outcome in zip(records, outcomes, strict=True):
                self._settle(record, outcome, reconciled=reconciled)
            if full := next((item for item in outcomes if isinstance(item, Unavailable)), None):
                raise full

    def _settle(self, record: SpoolRecord, outcome: bool | LongshoreError, *, reconciled: bool) -> None:
        if isinstance(outcome, bool):
            self._observer.redelivered("delivered" if outcome else "repeated")
            self._again.pop(record.key, None)
        elif isinstance(outcome, Fenced):
            # Until the learner has issued again what the broker lost, this may be a ticket that it lost.
            if reconciled:
                self._observer.redelivered("fenced")
                self._again.pop(record.key, None)
        elif not isinstance(outcome, Unavailable):
            log.error("spooled rollout refused", ticket=record.key, reason=str(outcome))
            self._observer.redelivered("rejected")
            self._forget({record.key})

    def _load(self, keys: Sequence[str]) -> tuple[list[SpoolRecord], list[str]]:
        """The records of the first keys, as many as one call should take; and the keys that are left."""
        records: list[SpoolRecord] = []
        size = 0
        for number, key in enumerate(keys):
            if len(records) >= _BATCH_COUNT or size >= _BATCH_BYTES:
                return records, list(keys[number:])
            try:
                records.append(self._spool.load(key))
                size += len(records[-1].payload)
            except NotFound:
                self._again.pop(key, None)
            except (IntegrityError, OSError) as error:
                # The disk has lost it; its ticket is attempted again when the broker has lost it, too.
                log.error("spooled rollout lost", ticket=key, reason=str(error))
                self._observer.redelivered("lost")
                self._forget({key})
        return records, []

    def _forget(self, keys: set[str]) -> None:
        for key in keys:
            self._again.pop(key, None)
        self._spool.forget(keys)


def _claim(job: JobRef, record: SpoolRecord) -> Claim:
    """A claim to deliver by: the broker compares its fence, and the ticket's own contents are long played."""
    ref = TicketRef.parse(job, record.key)
    ticket = Ticket(ref, 1, Purpose.TRAIN, Task("", ()), Sampling(1.0, 1), learner_epoch=0, issued_at=0.0)
    return Claim(ticket, record.attempt, record.entry_id)
