"""Tickets on the broker: the learner issues and closes them, actors claim, renew and give them back.

Each ticket is in one counted state at any moment; functions.lua makes every move. Knows what a ticket is, and nothing
of what an actor does with one. Every method raises BrokerLost (an Unavailable) when the broker stays away; all of them
can be called again after that.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import google.protobuf.message
import structlog
from redis.asyncio import Redis

from longshore.errors import Fenced, Rejected
from longshore.proto.v1 import ticket_pb2
from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import ACTORS, JobKeys
from longshore.rpc import convert
from longshore.types import JobRef, Ticket

log = structlog.get_logger()

T = TypeVar("T")

DRAIN = "drain"
UNAVAILABLE = "unavailable"
ATTEMPTS_EXHAUSTED = "attempts_exhausted"
MALFORMED = "malformed"
TRAINED = "trained"
FORWARDED = "forwarded"
LEASE_LOST = "lease_lost"
LIVE_STATES = ("queued", "running", "spooled", "awaiting_verdict", "delivered")

MAX_TICKET_BYTES = 4 * 1024 * 1024
# Rollouts that may wait for the learner on one broker before actors get no more tickets.
MAX_QUEUE_BYTES = 256 * 1024 * 1024
_LOOK_S = 0.25
MAX_DETAIL = 1000
# Bounds of one function call, which holds the broker while it runs.
_CALL_TICKETS = 500
_CALL_BYTES = 8 * 1024 * 1024
# XAUTOCLAIM looks at ten times its count; this many looks a call, then the next call goes on from there.
_MAX_SCANS = 16


@dataclass(frozen=True)
class Claim:
    """The right to make one attempt at a ticket, until its lease is not renewed in time.

    `attempt` fences: it grows by one whenever anybody starts on the ticket.
    """

    ticket: Ticket
    attempt: int
    entry_id: str

    @property
    def fence(self) -> tuple[str, int, str]:
        """What the broker's functions compare."""
        return (self.ticket.ref.key, self.attempt, self.entry_id)


class TicketQueue:
    """The tickets of one job at one site."""

    def __init__(
        self,
        redis: Redis,
        job: JobRef,
        site: str = "home",
        *,
        max_attempts: int = 5,
        lease_ms: int = 15_000,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
    ) -> None:
        assert max_attempts >= 1
        self._redis = redis
        self._job = job
        self._keys = JobKeys(job, site)
        self._max_attempts = max_attempts
        self._lease_ms = lease_ms
        self._max_queue_bytes = max_queue_bytes
        self._looked = 0.0
        self._scan = "0-0"

    async def setup(self) -> None:
        """Loads the functions and makes streams and groups. Idempotent; call again after a broker's restart."""
        await broker.setup(self._redis, self._keys)

    # -- learner -----------------------------------------------------------------------------------------------------

    async def open_epoch(self, at_least: int = 0) -> int:
        """Takes a new epoch, above every earlier one and above `at_least` (the newest that the caller knows of)."""
        return int(await broker.call(self._redis, self._keys, "open_epoch", at_least))

    async def raise_epoch(self, at_least: int) -> int:
        """Reminds a broker that lost its tail of an epoch. Returns the epoch in force; it never goes back."""
        return int(await broker.call(self._redis, self._keys, "raise_epoch", at_least))

    async def issue(self, epoch: int, tickets: Sequence[Ticket]) -> int:
        """Makes tickets claimable, in order; those that the broker knows already are left as they are.

        The broker remembers no ticket that ended: never issue one again that has.

        Returns:
            How many were new to the broker.

        Raises:
            Fenced: a newer epoch is open.
            Rejected: a ticket has more than MAX_TICKET_BYTES; none of its chunk was issued.
        """
        issued = 0
        for chunk in _chunked(self._encode(ticket) for ticket in tickets):
            reply = await broker.call(self._redis, self._keys, "issue", epoch, *chunk)
            issued += int(checked(reply, epoch)[0])
        return issued

    async def close(self, epoch: int, reason: str) -> dict[str, int]:
        """Ends every ticket that is not final with `reason`; later claims find nothing, later delivers are fenced.

        Returns:
            How many ended, by the state that they were in, where there were any.

        Raises:
            Fenced: a newer epoch is open.
        """
        check_reason(reason)
        totals: dict[str, int] = {}
        left = 1
        while left:
            reply = await broker.call(self._redis, self._keys, "close", epoch, reason, _CALL_TICKETS)
            left, *pairs = checked(reply, epoch)
            for state, ended in zip(pairs[::2], pairs[1::2], strict=True):
                totals[state.decode()] = totals.get(state.decode(), 0) + ended
        return totals

    # -- actor -------------------------------------------------------------------------------------------------------

    async def claim(self, actor: str, count: int, block_ms: int) -> list[Claim]:
        """Claims up to `count` queued tickets; waits for the first up to `block_ms` (at most 10 s; 0: not at all).

        None while more than `max_queue_bytes` of rollouts wait on the broker: whoever makes more has to wait (law 9).
        """
        if await self._is_full():
            await asyncio.sleep(min(block_ms, broker.MAX_BLOCK_MS) / 1000)
            return []
        found = await broker.read_group(
            self._redis, self._keys, self._keys.tickets, ACTORS, actor, ">", count, block_ms
        )
        return await self._start(actor, found)

    async def take_over(self, actor: str, count: int, lease_ms: int | None = None) -> list[Claim]:
        """Claims up to `count` tickets whose holders have not renewed them for `lease_ms` (default: the queue's).

        A ticket without attempts left ends as attempts_exhausted instead.
        """
        lease = self._lease_ms if lease_ms is None else lease_ms
        found: list[broker.Entry] = []
        for _ in range(_MAX_SCANS):
            self._scan, idle = await self._autoclaim(actor, count - len(found), lease)
            found.extend(idle)
            if len(found) >= count or self._scan == "0-0":
                break
        return await self._start(actor, found)

    async def renew(self, actor: str, claims: Sequence[Claim]) -> list[Claim]:
        """Keeps the leases of `claims` for another lease time. Returns those that are lost: stop work on them."""
        lost: list[Claim] = []
        for chunk in slices(claims, _CALL_TICKETS):
            fences = [part for claim in chunk for part in claim.fence]
            kept = await broker.call(self._redis, self._keys, "renew", actor, *fences)
            lost.extend(claim for claim, is_kept in zip(chunk, kept, strict=True) if not is_kept)
        return lost

    async def give_back(self, claim: Claim, reason: str) -> None:
        """Returns a ticket to the queue at once; without attempts left it ends as attempts_exhausted.

        DRAIN says that the attempt was told to end: it does not count. After that, and after UNAVAILABLE (a peer was
        away), the next attempt finds the journal; an attempt that was itself at fault leaves none. Does nothing when
        the claim is no longer held.
        """
        flags = ("0" if reason == DRAIN else "1", "1" if reason in (DRAIN, UNAVAILABLE) else "0")
        await broker.call(
            self._redis, self._keys, "give_back", *claim.fence, self._max_attempts, *flags, reason[:MAX_DETAIL]
        )

    async def reject(self, claim: Claim, reason: str, detail: str) -> None:
        """Ends a ticket that no attempt can do (its prompt is too long, say) and tells the learner.

        Does nothing when the claim is no longer held.
        """
        check_reason(reason)
        await self._reject(claim.fence, reason, detail)

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _is_full(self) -> bool:
        """Looks now and then: a few rollouts over the limit do no harm, a round trip for each claim would."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return False
        with broker.reaching():
            waiting = await self._redis.hget(self._keys.counts, "bytes")
        if waiting is not None and int(waiting) > self._max_queue_bytes:
            return True
        self._looked = now
        return False

    def _encode(self, ticket: Ticket) -> tuple[str, bytes]:
        assert ticket.ref.job == self._job
        payload = convert.ticket_to_proto(ticket).SerializeToString()
        if len(payload) > MAX_TICKET_BYTES:
            raise Rejected("oversized", f"ticket {ticket.ref.key} has {len(payload)} bytes, over {MAX_TICKET_BYTES}")
        return ticket.ref.key, payload

    async def _autoclaim(self, actor: str, count: int, lease_ms: int) -> tuple[str, list[broker.Entry]]:
        cursor, found, _deleted = await broker.healed(
            self._redis,
            self._keys,
            lambda: self._redis.xautoclaim(self._keys.tickets, ACTORS, actor, lease_ms, self._scan, count=count),
        )
        return cursor.decode(), broker.entries(found)

    async def _start(self, actor: str, found: list[broker.Entry]) -> list[Claim]:
        """Turns entries that are this actor's into attempts; leaves out tickets that ended on the way."""
        claims: list[Claim] = []
        for chunk in slices(found, _CALL_TICKETS):
            pairs = [part for entry_id, fields in chunk for part in (entry_id, fields.get(b"key", b""))]
            nonce = secrets.token_hex(8)
            attempts = await broker.call(self._redis, self._keys, "start", actor, nonce, self._max_attempts, *pairs)
            for (entry_id, fields), attempt in zip(chunk, attempts, strict=True):
                if attempt and (claim := await decode_claim(self._redis, self._keys, entry_id, fields, attempt)):
                    claims.append(claim)
        return claims

    async def _reject(self, fence: tuple[str, int, str], reason: str, detail: str) -> None:
        await broker.call(self._redis, self._keys, "reject", *fence, reason, detail[:MAX_DETAIL])


async def decode_claim(
    redis: Redis, keys: JobKeys, entry_id: str, fields: dict[bytes, bytes], attempt: int
) -> Claim | None:
    """A started ticket's claim; None when it cannot be read: then it has been rejected."""
    try:
        message = ticket_pb2.Ticket.FromString(fields[b"payload"])
        return Claim(convert.ticket_from_proto(message), attempt, entry_id)
    except (google.protobuf.message.DecodeError, Rejected) as error:
        # No actor of this release can work on it, so it must not come back to the queue.
        key = fields[b"key"].decode(errors="replace")
        log.error("ticket cannot be read", ticket=key, reason=str(error))
        await broker.call(redis, keys, "reject", key, attempt, entry_id, MALFORMED, str(error)[:MAX_DETAIL])
        return None


def checked(reply: list[Any], epoch: int) -> list[Any]:
    """What follows 'ok' in a function's reply. Raises Fenced when the epoch was refused."""
    if reply[0] == b"fenced":
        raise Fenced(f"learner epoch {epoch} has been superseded by {int(reply[1])}")
    return reply[1:]


def check_reason(reason: str) -> None:
    """Raises ValueError unless `reason` can name a counter of final tickets."""
    if not re.fullmatch("[a-z][a-z0-9_]{0,39}", reason) or reason in LIVE_STATES:
        raise ValueError(f"not a final reason: {reason!r}")


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _chunked(encoded: Iterator[tuple[str, bytes]]) -> Iterator[list[str | bytes]]:
    """Arguments of one call each: bounded in tickets and in bytes."""
    chunk: list[str | bytes] = []
    size = 0
    for key, payload in encoded:
        if chunk and (len(chunk) >= 2 * _CALL_TICKETS or size + len(payload) > _CALL_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk += (key, payload)
        size += len(payload)
    if chunk:
        yield chunk
