"""Handing in a finished rollout: onto our disk, then to the broker, however full that is.

    consumes   a finished rollout     waits for       the disk; the broker
    produces   a spooled record,      unblocked by    the broker's return, or the learner making room
               a delivery

Without a spool, or without room in it, rollouts are delivered all the same. What becomes of a record afterwards is the
sweeper's business.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from longshore.actor.retry import persist
from longshore.errors import Fenced, LongshoreError, Rejected, Unavailable
from longshore.rollout_queue.broker import BrokerLost
from longshore.rollout_queue.spool import Spool, SpoolFull, SpoolRecord
from longshore.rollout_queue.tickets import Claim

log = structlog.get_logger()

_FIRST_HOLD_S = 0.2
_LONGEST_HOLD_S = 5.0
# Free space that the spool's disk must have before more is claimed, as far as the disk is that large.
_FREE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Finished:
    """A rollout as it is delivered."""

    payload: bytes
    awaiting_verdict: bool = False


class Rollouts(Protocol):
    """What an outbox needs of rollout_queue.RolloutQueue."""

    async def deliver(self, claim: Claim, rollout: bytes, awaiting_verdict: bool = False) -> bool: ...


class OutboxObserver(Protocol):
    """Told of rollouts that did not go out as they should, for metrics."""

    def not_spooled(self) -> None: ...
    def held(self) -> None: ...


@dataclass(frozen=True)
class SpoolPlace:
    """A spool and the folder that it is in, whose disk may fill up."""

    spool: Spool
    folder: Path


class Outbox:
    """Hands in the rollouts of one actor. `place` None: nothing is spooled."""

    def __init__(
        self, rollouts: Rollouts, place: SpoolPlace | None, broker_patience_s: float, observer: OutboxObserver
    ) -> None:
        self._rollouts = rollouts
        self._place = place
        self._broker_patience_s = broker_patience_s
        self._observer = observer
        # Size of a rollout that did not fit into the spool.
        self._refused_bytes = 0

    def holds(self, claim: Claim) -> bool:
        """Whether the ticket's rollout is spooled: it will be delivered whatever becomes of this process."""
        return self._place is not None and claim.ticket.ref.key in self._place.spool

    def has_room(self) -> bool:
        """False from when a rollout did not fit into the spool until one like it would: claim no more."""
        if self._place is None or not self._refused_bytes:
            return True
        spool, disk = self._place.spool, shutil.disk_usage(self._place.folder)
        # Only an append tidies up: files that are mostly waste must not keep us from making one.
        tidied = 2 * spool.wanted_bytes + spool.max_bytes // 4
        fits = min(spool.used_bytes, tidied) + self._refused_bytes <= spool.max_bytes
        if fits and disk.free >= self._refused_bytes + min(_FREE_BYTES, disk.total // 16):
            self._refused_bytes = 0
            log.info("the spool has room again", used_bytes=spool.used_bytes)
        return not self._refused_bytes

    async def hand_in(self, claim: Claim, finished: Finished, is_lost: Callable[[], bool] = lambda: False) -> None:
        """Returns when the rollout is delivered. A broker without room is waited for as long as the lease lives.

        Args:
            is_lost: whether the lease has been lost meanwhile.

        Raises:
            Fenced: it is of no use (any more).
            Rejected: `oversized`.
            Unavailable: the broker stayed away for longer than our patience.
        """
        await self._spool(claim, finished)
        pause = _FIRST_HOLD_S
        while True:
            try:
                await persist(partial(self._deliver, claim, finished), self._broker_patience_s)
                return
            except Rejected:
                if self._place is not None:
                    self._place.spool.forget([claim.ticket.ref.key])
                raise
            except _NoRoom as error:
                if is_lost():
                    raise Fenced(f"ticket {claim.ticket.ref.key}: its lease was lost while it was held") from None
                log.warning("rollout held", ticket=claim.ticket.ref.key, reason=str(error))
                self._observer.held()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_HOLD_S)

    async def _spool(self, claim: Claim, finished: Finished) -> None:
        if self._place is None:
            return
        key, attempt, entry_id = claim.fence
        record = SpoolRecord(key, attempt, entry_id, finished.payload, awaiting_verdict=finished.awaiting_verdict)
        try:
            await self._place.spool.append([record])
        except (SpoolFull, OSError) as error:
            # Delivering beats holding: what is missing is only the second copy.
            log.warning("rollout not spooled", ticket=key, reason=str(error))
            self._refused_bytes = max(self._refused_bytes, len(finished.payload), 1)
            self._observer.not_spooled()

    async def _deliver(self, claim: Claim, finished: Finished) -> None:
        try:
            await self._rollouts.deliver(claim, finished.payload, finished.awaiting_verdict)
        except BrokerLost:
            raise
        except Unavailable as error:
            raise _NoRoom(str(error)) from error


class _NoRoom(LongshoreError):
    """The broker is there and takes nothing, or the storage for large rollouts is away."""
