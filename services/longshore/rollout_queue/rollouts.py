"""Rollouts on the broker: actors deliver them, the learner reads and acknowledges them.

A rollout is delivered once for a ticket: the first delivery of the attempt that holds it wins. Payloads are bytes
here; what they mean is checked by who reads them (rpc.convert_rollout). One too large for the stream goes to object
storage, where there is one, and its place in the stream holds path and checksum. Every method raises BrokerLost (an
Unavailable) when the broker stays away, and Unavailable when the storage does; all of them can be called again after
that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from redis.asyncio import Redis

from longshore.errors import Conflict, Fenced, IntegrityError, LongshoreError, NotFound, Rejected, Unavailable
from longshore.rollout_queue import broker, heads, payload
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.keys import LEARNER, JobKeys
from longshore.rollout_queue.stream_reader import StreamReader
from longshore.rollout_queue.tickets import MAX_DETAIL, Claim, check_reason, checked, slices
from longshore.types import JobRef

log = structlog.get_logger()

# Packed payloads above this go to object storage, where there is one.
INLINE_BYTES = 256 * 1024
MAX_VERDICT_BYTES = 64 * 1024 * 1024
_BLOB = "blob+"
_CALL_ENDS = 500
_CALL_KEYS = 1000
# Rollouts of one function call, which holds the broker while it runs.
_CALL_BYTES = 1024 * 1024
_CALL_ROLLOUTS = 128
# Rollouts of one round trip: their bytes are in memory twice while they are sent.
_TRIP_BYTES = 8 * 1024 * 1024
# Bytes that one read aims at, going by the size of the rollouts so far.
_READ_BYTES = 64 * 1024 * 1024
# A payload below this is packed on the event loop: a thread would cost more.
_THREAD_BYTES = 256 * 1024


class Delivery(NamedTuple):
    """An entry of the rollouts stream: a rollout, a verdict that came after its rollout, or the notice that a ticket
    ended without one.

    `payload` is None for a verdict (see `verdict`) and for a notice (`final_reason` and `detail` say why). A payload
    that did not survive its way (unknown codec, wrong checksum) is b"", which no validation lets pass; its dead letter
    holds what came.
    """

    entry_id: str
    ticket_key: str
    attempt: int
    payload: bytes | None
    final_reason: str | None
    # The site whose actor made it.
    site: str
    awaiting_verdict: bool = False
    verdict: bytes | None = None
    detail: str = ""


@dataclass(frozen=True)
class End:
    """How a ticket ended: `trained` or a final reason. `entry_id` None: the learner knows of no entry."""

    entry_id: str | None
    ticket_key: str
    outcome: str


class _Packed(NamedTuple):
    """A rollout on its way: its place among those to deliver, and what goes into the call."""

    place: int
    claim: Claim
    head: str
    data: bytes
    # Whether `data` is the path of a blob.
    is_path: bool


class RolloutQueue:
    """The rollouts of one job in the queue of one site. The learner has one instance a life; actors may share one.

    `maker` is the site that delivers, where it is not the queue's own: a relay's, for the home queue.
    """

    def __init__(
        self, redis: Redis, job: JobRef, site: str = "home", *, blobs: Blobs | None = None, maker: str = ""
    ) -> None:
        self._redis = redis
        self._job = job
        self._keys = JobKeys(job, site)
        self._blobs = blobs
        self._maker = maker
        self._reader = StreamReader(redis, self._keys)
        self._mean_bytes = 16 * 1024
        # Blobs of entries that were handed out, to be deleted with them.
        self._blob_of: dict[str, str] = {}

    # -- actor -------------------------------------------------------------------------------------------------------

    async def deliver(self, claim: Claim, rollout: bytes, awaiting_verdict: bool = False) -> bool:
        """Hands a rollout in and closes the lease, in one act.

        Taken too when the lease has run out and nobody has started anew, also because the broker lost its tail.

        Returns:
            True: delivered now. False: these very bytes had been delivered before; harmless.

        Raises:
            Fenced: another attempt holds or delivered the ticket, or the broker does not know it: it has ended, or the
                broker lost its tail (then `covered` does not name it, and it may be delivered again later).
            Rejected: `oversized`.
            BrokerFull: its memory is full; worth waiting for.
        """
        (outcome,) = await self.deliver_many([(claim, rollout, awaiting_verdict)])
        if isinstance(outcome, LongshoreError):
            raise outcome
        return outcome

    async def deliver_many(self, rollouts: Sequence[tuple[Claim, bytes, bool]]) -> list[bool | LongshoreError]:
        """`deliver` of each (claim, rollout, whether it awaits its verdict), in few round trips. Each stands by itself.

        Returns:
            For each what `deliver` would return, or raise for this rollout alone.
        """
        outcomes: list[bool | LongshoreError] = [False] * len(rollouts)
        trip: list[_Packed] = []
        size = 0
        for index, (claim, rollout, awaiting) in enumerate(rollouts):
            try:
                small = len(rollout) < _THREAD_BYTES
                packed = payload.encode(rollout) if small else await self._pack_large(claim, rollout)
            except (Rejected, Unavailable) as error:
                outcomes[index] = error
                continue
            if trip and size + len(packed.data) > _TRIP_BYTES:
                await self._send(trip, outcomes)
                trip, size = [], 0
            head = heads.to_deliver(claim.fence, packed.digest, packed.codec, awaiting)
            trip.append(_Packed(index, claim, head, packed.data, packed.codec.startswith(_BLOB)))
            size += len(packed.data)
        if trip:
            await self._send(trip, outcomes)
        return outcomes

    async def deliver_verdict(self, ticket_key: str, verdict: bytes) -> None:
        """Hands in the verdict that a delivered rollout awaits.

        Raises:
            NotFound: the ticket is not out: it was never issued, or has ended.
            Conflict: it awaits no verdict.
            Rejected: `oversized`.
        """
        if len(verdict) > MAX_VERDICT_BYTES:
            raise Rejected(
                "oversized", f"the verdict has {len(verdict)} bytes, at most {MAX_VERDICT_BYTES} are allowed"
            )
        reply = await broker.call(self._redis, self._keys, "verdict", ticket_key, verdict)
        if reply == b"gone":
            raise NotFound(f"ticket {ticket_key} is not out: it was never issued, or it has ended")
        if reply == b"taken":
            raise Conflict(f"ticket {ticket_key} awaits no verdict")

    async def covered(self, ticket_keys: Sequence[str]) -> set[str] | None:
        """Those whose end the learner's durable checkpoint contains: what is spooled of them may be forgotten.

        None while the learner has not reconciled with this incarnation of the broker: nothing may be forgotten.
        """
        found: set[str] = set()
        for chunk in slices(ticket_keys, _CALL_KEYS):
            reply = await broker.call(self._redis, self._keys, "covered", *chunk)
            if reply[0] == b"unreconciled":
                return None
            found.update(key for key, has_ended in zip(chunk, reply, strict=True) if has_ended)
        return found

    # -- people ------------------------------------------------------------------------------------------------------

    async def look(self, entry_id: str) -> Delivery | None:
        """An entry as it stands, for who only wants to see it; None when it is not there any more."""
        with broker.reaching():
            found = await self._redis.xrange(self._keys.rollouts, min=entry_id, max=entry_id)
        deliveries = await self._decode_all(broker.entries(found))
        return deliveries[0] if deliveries else None

    # -- learner -----------------------------------------------------------------------------------------------------

    async def read(self, count: int, block_ms: int) -> list[Delivery]:
        """Up to `count` entries that this instance has not handed out, oldest first.

        Waits for the first up to `block_ms` (at most 10 s; 0: not at all). Those that an earlier life read and did
        not acknowledge come first, unless read_pending brought them. After a broker that lost its tail, entries can
        come a second time: tell them by their ticket.
        """
        return await self._give(await self._reader.next(self._fitting(count), block_ms))

    async def read_pending(self, after: str = "0", count: int = 256) -> list[Delivery]:
        """Entries that were read and not acknowledged, oldest first: what a restarted learner starts with.

        Returns one page after the entry id `after`; empty when there are no more.
        """
        while found := await self._reader.pending(after, self._fitting(count)):
            after = found[-1][0]
            if deliveries := await self._give(found):
                return deliveries
        return []

    async def acknowledge(self, epoch: int, ends: Sequence[End]) -> None:
        """Ends tickets, whatever state the broker thinks they are in, and forgets their entries. Idempotent.

        Raises:
            Fenced: a newer epoch is open.
        """
        for outcome in {end.outcome for end in ends}:
            check_reason(outcome)
        for start in range(0, len(ends), _CALL_ENDS):
            parts = [
                f"{end.entry_id or '-'} {end.outcome} {end.ticket_key}" for end in ends[start : start + _CALL_ENDS]
            ]
            checked(await broker.call(self._redis, self._keys, "acknowledge", epoch, *parts), epoch)
        await self._forget_blobs([end.entry_id for end in ends if end.entry_id])

    async def dead_letter(self, epoch: int, delivery: Delivery, reason: str, detail: str, task: bytes = b"") -> bool:
        """Sets an entry aside that failed validation, with a copy for people. Idempotent.

        Returns:
            Whether its ticket has ended with it, as `rejected` unless it had ended before. False: the entry was not
            the one that the ticket's holder delivered (a forgery, a repeat), so the ticket goes on without it.

        Raises:
            Fenced: a newer epoch is open.
        """
        parts = (delivery.entry_id, delivery.ticket_key, reason[:MAX_DETAIL], detail[:MAX_DETAIL], task)
        reply = checked(await broker.call(self._redis, self._keys, "dead_letter", epoch, *parts), epoch)
        self._blob_of.pop(delivery.entry_id, None)
        return bool(reply[0])

    async def reconcile(self, epoch: int, incarnation: str, finals: Mapping[tuple[str, str], int] | None) -> int:
        """Makes the broker's counts anew from the tickets that it knows and the final counts given by (site, outcome);
        None: those that it has. From then on `covered` answers.

        To be called at the learner's start and after a new incarnation of the broker: when this `incarnation` has been
        told of every ticket still out, and a durable checkpoint contains all that ended. Returns how many tickets were
        issued.

        Raises:
            Fenced: a newer epoch is open.
            Unavailable: the broker has restarted since then, and has to be told again.
        """
        parts: list[str | int] = [incarnation, "kept" if finals is None else "given"]
        for (site, outcome), number in (finals or {}).items():
            check_reason(outcome)
            parts += (site, outcome, number)
        reply = await broker.call(self._redis, self._keys, "reconcile", epoch, *parts)
        if reply[0] == b"restarted":
            raise Unavailable(f"the broker has restarted: {incarnation} is gone")
        return int(checked(reply, epoch)[0])

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _pack_large(self, claim: Claim, rollout: bytes) -> payload.Packed:
        """A rollout as it goes into the stream: itself, or the path under which it lies in the storage."""
        packed = await asyncio.to_thread(payload.encode, rollout)
        if self._blobs is None or len(packed.data) <= INLINE_BYTES:
            return packed
        # The path holds all that makes a delivery the same one, so a repeated delivery writes the same object. Others
        # may be able to write to the storage: the path, which lies in the stream, tells what must be found there.
        path = f"{self._job}/rollouts/{claim.ticket.ref.key}/{claim.attempt}/{await _sha256(packed.data)}"
        await self._blobs.put(path, packed.data)
        return payload.Packed(_BLOB + packed.codec, path.encode(), packed.digest)

    async def _send(self, trip: Sequence[_Packed], outcomes: list[bool | LongshoreError]) -> None:
        calls = list(_calls(trip))
        parts = [(self._maker, *(part for item in call for part in (item.head, item.data))) for call in calls]
        replies = await broker.call_many(self._redis, self._keys, "deliver", parts)
        for call, reply in zip(calls, replies, strict=True):
            answers = [reply] * len(call) if isinstance(reply, LongshoreError) else reply
            for item, answer in zip(call, answers, strict=True):
                outcomes[item.place] = _outcome(item.claim, answer)
        # No entry can hold the path of one that was not taken: it names the attempt and the bytes.
        unused = [item.data.decode() for item in trip if item.is_path and isinstance(outcomes[item.place], Fenced)]
        if unused and self._blobs is not None:
            with contextlib.suppress(Unavailable):
                await self._blobs.delete(unused)

    async def _unpacked(self, codec: str, data: bytes, digest: str) -> bytes:
        if codec.startswith(_BLOB):
            if self._blobs is None:
                raise Rejected("blob", "it lies in an object storage that this process was not given")
            codec = codec.removeprefix(_BLOB)
            path = data.decode(errors="replace")
            if not path.startswith(f"{self._job}/rollouts/") or ".." in path:
                raise Rejected("blob", f"{path[:200]!r} is no place of this job's rollouts")
            try:
                data = await self._blobs.get(path, payload.MAX_BYTES)
            except NotFound as error:
                raise Rejected("blob", str(error)) from None
            if await _sha256(data) != path.rpartition("/")[2]:
                raise IntegrityError(f"blob {path} does not hold what was put there")
        if len(data) < _THREAD_BYTES:
            return payload.decode(payload.Packed(codec, data, digest))
        return await asyncio.to_thread(payload.decode, payload.Packed(codec, data, digest))

    async def _forget_blobs(self, entry_ids: Sequence[str]) -> None:
        paths = [self._blob_of.pop(entry_id) for entry_id in entry_ids if entry_id in self._blob_of]
        if paths and self._blobs is not None:
            await self._blobs.delete(paths)

    def _fitting(self, count: int) -> int:
        return min(count, max(1, _READ_BYTES // self._mean_bytes))

    async def _give(self, found: list[broker.Entry]) -> list[Delivery]:
        # Should the storage of large ones be away, none of these is handed out: they are read again.
        deliveries = await self._decode_all(found)
        self._reader.gave(found)
        return deliveries

    async def _decode_all(self, found: list[broker.Entry]) -> list[Delivery]:
        deliveries = []
        for entry_id, fields in found:
            if b"rollout" in fields:
                deliveries.append(await self._decode(entry_id, fields))
            elif b"key" in fields:
                deliveries.append(self._decode_notice(entry_id, fields))
            else:
                # Nobody's: no function of ours writes such an entry, so no ticket waits for it.
                log.error("rollout entry without a ticket", entry=entry_id)
                await self._drop(entry_id)
        return deliveries

    async def _decode(self, entry_id: str, fields: dict[bytes, bytes]) -> Delivery:
        head = heads.read(fields[b"rollout"])
        body = b""
        try:
            if not head.is_known:
                raise Rejected("schema", f"an entry of schema {head.schema[:20]!r}, or damaged")
            data = fields.get(b"payload", b"")
            body = await self._unpacked(head.codec, data, head.digest)
            if head.codec.startswith(_BLOB):
                self._blob_of[entry_id] = data.decode()
        except (Rejected, IntegrityError) as error:
            log.error("rollout cannot be read", ticket=head.key, entry=entry_id, reason=str(error))
        self._mean_bytes += (len(body) - self._mean_bytes) // 8
        site, attempt = head.site or self._keys.site, heads.number(head.attempt)
        return Delivery(entry_id, head.key, attempt, body, None, site, awaiting_verdict=head.awaiting == "1")

    def _decode_notice(self, entry_id: str, fields: dict[bytes, bytes]) -> Delivery:
        """A verdict, or the end of a ticket without a rollout; or nothing that can be read."""

        def word(name: bytes) -> str:
            return fields.get(name, b"").decode(errors="replace")

        key, attempt, site = word(b"key"), heads.number(word(b"attempt")), word(b"site") or self._keys.site
        if b"final" in fields:
            return Delivery(entry_id, key, attempt, None, word(b"final"), site, detail=word(b"detail"))
        if b"verdict" in fields:
            return Delivery(entry_id, key, attempt, None, None, site, verdict=fields[b"verdict"])
        log.error("rollout cannot be read", ticket=key, entry=entry_id, reason="it has no rollout")
        return Delivery(entry_id, key, attempt, b"", None, site)

    async def _drop(self, entry_id: str) -> None:
        with broker.reaching():
            await self._redis.xack(self._keys.rollouts, LEARNER, entry_id)
            await self._redis.xdel(self._keys.rollouts, entry_id)


async def _sha256(data: bytes) -> str:
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()


def _calls(trip: Sequence[_Packed]) -> Iterator[list[_Packed]]:
    """What goes into one function call each."""
    call: list[_Packed] = []
    size = 0
    for item in trip:
        if call and (len(call) >= _CALL_ROLLOUTS or size + len(item.data) > _CALL_BYTES):
            yield call
            call, size = [], 0
        call.append(item)
        size += len(item.data)
    yield call


def _outcome(claim: Claim, reply: bytes | LongshoreError) -> bool | LongshoreError:
    if isinstance(reply, LongshoreError):
        return reply
    if reply in (b"gone", b"taken"):
        why = "is not known: it has ended" if reply == b"gone" else "is no longer held by this attempt"
        return Fenced(f"ticket {claim.ticket.ref.key}, attempt {claim.attempt}: it {why}")
    return reply == b"delivered"
