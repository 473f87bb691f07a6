"""Rollouts on the broker: actors deliver them, the learner reads and acknowledges them.

A rollout is delivered once for a ticket: the first delivery of the attempt that holds it wins. Payloads are bytes
here; what they mean is checked by who reads them (rpc.convert_rollout). Every method raises BrokerLost (an
Unavailable) when the broker stays away; all of them can be called again after that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from longshore.errors import Fenced, IntegrityError, Rejected
from longshore.rollout_queue import broker, payload
from longshore.rollout_queue.keys import LEARNER, JobKeys
from longshore.rollout_queue.tickets import MAX_DETAIL, Claim, check_reason, checked
from longshore.types import JobRef

log = structlog.get_logger()

_CALL_ENDS = 500
# Bytes that one read aims at, going by the size of the rollouts so far.
_READ_BYTES = 64 * 1024 * 1024
# A payload below this is packed on the event loop: a thread would cost more.
_THREAD_BYTES = 256 * 1024


@dataclass(frozen=True)
class Delivery:
    """An entry of the rollouts stream: a rollout, or the notice that its ticket ended without one.

    `payload` is None for a notice, whose `final_reason` says why. A payload that did not survive its way (unknown
    codec, wrong checksum) is b"", which no validation lets pass; its dead letter holds what came.
    """

    entry_id: str
    ticket_key: str
    attempt: int
    payload: bytes | None
    final_reason: str | None
    site: str


@dataclass(frozen=True)
class End:
    """How a ticket ended: `trained` or a final reason. `entry_id` None: the learner knows of no entry."""

    entry_id: str | None
    ticket_key: str
    outcome: str


class RolloutQueue:
    """The rollouts of one job from one site. The learner has one instance a life; actors may share one."""

    def __init__(self, redis: Redis, job: JobRef, site: str = "home") -> None:
        self._redis = redis
        self._keys = JobKeys(job, site)
        # Newest entry that this instance has handed out.
        self._handed_out = "0"
        self._mean_bytes = 16 * 1024

    # -- actor -------------------------------------------------------------------------------------------------------

    async def deliver(self, claim: Claim, rollout: bytes) -> bool:
        """Hands a rollout in and closes the lease, in one act.

        Returns:
            True: delivered now. False: these very bytes had been delivered before; harmless.

        Raises:
            Fenced: another attempt holds or delivered the ticket, or it has ended. The rollout is of no use.
            Rejected: `oversized`.
        """
        if len(rollout) < _THREAD_BYTES:
            packed = payload.encode(rollout)
        else:
            packed = await asyncio.to_thread(payload.encode, rollout)
        reply = await broker.call(
            self._redis, self._keys, "deliver", *claim.fence, packed.sha256, packed.codec, packed.data
        )
        if reply in (b"gone", b"taken"):
            why = "has ended" if reply == b"gone" else "is no longer held by this attempt"
            raise Fenced(f"ticket {claim.ticket.ref.key}, attempt {claim.attempt}: it {why}")
        return bool(reply == b"delivered")

    # -- learner -----------------------------------------------------------------------------------------------------

    async def read(self, count: int, block_ms: int) -> list[Delivery]:
        """Up to `count` entries that this instance has not handed out, oldest first.

        Waits for the first up to `block_ms` (at most 10 s; 0: not at all). Those that an earlier life read and did
        not acknowledge come first, unless read_pending brought them. After a broker that lost its tail, entries can
        come a second time: tell them by their ticket.
        """
        # Sent to us in a reply that got lost, or to a learner that we superseded: pending, and newer than ours.
        missed = await self._read(self._handed_out, count, 0)
        found = missed or await self._read(">", count, block_ms)
        if found:
            self._handed_out = found[-1][0]
        return await self._decode_all(found)

    async def read_pending(self, after: str = "0", count: int = 256) -> list[Delivery]:
        """Entries that were read and not acknowledged, oldest first: what a restarted learner starts with.

        Returns one page after the entry id `after`; empty when there are no more.
        """
        while found := await self._read(after, count, 0):
            after = found[-1][0]
            self._handed_out = max(self._handed_out, after, key=_order)
            if deliveries := await self._decode_all(found):
                return deliveries
        return []

    async def acknowledge(self, epoch: int, ends: Sequence[End]) -> None:
        """Ends tickets, whatever state the broker thinks they are in, and forgets their entries. Idempotent.

        Raises:
            Fenced: a newer epoch is open.
        """
        for start in range(0, len(ends), _CALL_ENDS):
            parts: list[str] = []
            for end in ends[start : start + _CALL_ENDS]:
                check_reason(end.outcome)
                parts += (end.entry_id or "", end.ticket_key, end.outcome)
            checked(await broker.call(self._redis, self._keys, "acknowledge", epoch, *parts), epoch)

    async def dead_letter(self, epoch: int, delivery: Delivery, reason: str, detail: str) -> None:
        """Ends a ticket as `rejected` whose rollout failed validation, and keeps a copy for people. Idempotent.

        Raises:
            Fenced: a newer epoch is open.
        """
        parts = (delivery.entry_id, delivery.ticket_key, reason[:MAX_DETAIL], detail[:MAX_DETAIL])
        checked(await broker.call(self._redis, self._keys, "dead_letter", epoch, *parts), epoch)

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _read(self, after: str, count: int, block_ms: int) -> list[broker.Entry]:
        fitting = min(count, max(1, _READ_BYTES // self._mean_bytes))
        return await broker.read_group(
            self._redis, self._keys, self._keys.rollouts, LEARNER, LEARNER, after, fitting, block_ms
        )

    async def _decode_all(self, found: list[broker.Entry]) -> list[Delivery]:
        deliveries = []
        for entry_id, fields in found:
            if b"key" in fields:
                deliveries.append(self._decode(entry_id, fields))
            else:
                # Nobody's: no function of ours writes such an entry, so no ticket waits for it.
                log.error("rollout entry without a ticket", entry=entry_id)
                await self._drop(entry_id)
        return deliveries

    def _decode(self, entry_id: str, fields: dict[bytes, bytes]) -> Delivery:
        key, attempt = fields[b"key"].decode(), int(fields.get(b"attempt", b"0"))
        final = fields.get(b"final")
        if final is not None:
            return Delivery(entry_id, key, attempt, None, final.decode(), self._keys.site)
        body = b""
        try:
            if (schema := fields.get(b"schema")) != b"1":
                raise Rejected("schema", f"unknown schema {schema!r}")
            codec, sha256 = (fields.get(name, b"").decode(errors="replace") for name in (b"codec", b"sha256"))
            body = payload.decode(payload.Packed(codec, fields.get(b"payload", b""), sha256))
        except (Rejected, IntegrityError) as error:
            log.error("rollout cannot be read", ticket=key, entry=entry_id, reason=str(error))
        self._mean_bytes += (len(body) - self._mean_bytes) // 8
        return Delivery(entry_id, key, attempt, body, None, self._keys.site)

    async def _drop(self, entry_id: str) -> None:
        with broker.reaching():
            await self._redis.xack(self._keys.rollouts, LEARNER, entry_id)
            await self._redis.xdel(self._keys.rollouts, entry_id)


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
