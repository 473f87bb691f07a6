"""The home broker as a rollout site sees it: tickets taken under a lease of hours, kept, given back.

A leased ticket's entry is in a stream of its own, where the actors of the home site do not look; it comes to another
site, or back to the queue, only when its lease has run out. Every method raises BrokerLost when the broker stays away;
all of them can be called again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import SITES, JobKeys
from longshore.rollout_queue.tickets import DRAIN, MAX_DETAIL, Claim, check_reason, decode_claim, slices
from longshore.types import JobRef

LEASE_MS = 4 * 3600 * 1000
_CALL_TICKETS = 500


class SiteLeases:
    """The tickets of one job that one site holds, at the home broker.

    `redis` must be a client without patience: `lease` and `adopt` made a second time give what the first left over.
    """

    def __init__(
        self, redis: Redis, job: JobRef, site: str, *, max_attempts: int = 5, lease_ms: int = LEASE_MS
    ) -> None:
        assert site != "home", "the home site's actors claim from the queue itself"
        self._redis = redis
        self._keys = JobKeys(job)
        self._site = site
        self._max_attempts = max_attempts
        self._lease_ms = lease_ms

    async def setup(self) -> None:
        """Loads the functions and makes streams and groups. Idempotent."""
        await broker.setup(self._redis, self._keys)

    async def lease(self, count: int) -> list[Claim]:
        """Takes up to `count` queued tickets; when there are none, tickets whose site lease ran out.

        A call whose answer got lost leaves tickets with this site that the caller does not know: see `held`.
        """
        found = await broker.call(
            self._redis,
            self._keys,
            "lease",
            self._site,
            secrets.token_hex(8),
            min(count, _CALL_TICKETS),
            self._max_attempts,
            self._lease_ms,
        )
        return await self._claims(found)

    async def held(self) -> list[Claim]:
        """Every ticket that this site holds, as the home broker knows it. Renews their leases."""
        claims: list[Claim] = []
        after = "0"
        while page := await broker.read_group(
            self._redis, self._keys, self._keys.leased, SITES, self._site, after, _CALL_TICKETS, 0
        ):
            after = page[-1][0]
            claims += await self._with_attempts(page)
        return claims

    async def adopt(self, keys: Sequence[str]) -> list[Claim]:
        """Takes those of `keys` that are queued: work on them goes on here, though the broker forgot our lease.

        As with `lease`, a lost answer leaves tickets with this site.
        """
        claims: list[Claim] = []
        for chunk in slices(keys, _CALL_TICKETS):
            found = await broker.call(self._redis, self._keys, "adopt", self._site, secrets.token_hex(8), *chunk)
            claims += await self._claims(found)
        return claims

    async def renew(self, claims: Sequence[tuple[Claim, bool]]) -> list[Claim]:
        """Keeps the leases of (claim, whether its rollout is spooled here). Returns those that are lost."""
        lost: list[Claim] = []
        for chunk in slices(claims, _CALL_TICKETS):
            parts: list[str | int] = []
            for claim, spooled in chunk:
                parts += (*claim.fence, "spooled" if spooled else "running")
            kept = await broker.call(self._redis, self._keys, "renew_site", self._site, *parts)
            lost += [claim for (claim, _), is_kept in zip(chunk, kept, strict=True) if not is_kept]
        return lost

    async def give_back(self, claim: Claim, reason: str) -> None:
        """As TicketQueue.give_back."""
        counts = "0" if reason == DRAIN else "1"
        await broker.call(
            self._redis, self._keys, "give_back", *claim.fence, self._max_attempts, counts, "0", reason[:MAX_DETAIL]
        )

    async def reject(self, claim: Claim, reason: str, detail: str) -> None:
        """Ends a ticket that this site could not do, and tells the learner. As TicketQueue.reject."""
        check_reason(reason)
        await broker.call(self._redis, self._keys, "reject", *claim.fence, reason, detail[:MAX_DETAIL])

    async def _claims(self, found: list[Any]) -> list[Claim]:
        claims = []
        payload = b""
        for entry_id, attempt, key, head, tail, rest in found:
            # What it has in common with the one before was not sent again.
            payload = payload[:head] + rest + payload[len(payload) - tail :]
            fields = {b"key": key, b"payload": payload}
            claim = await decode_claim(self._redis, self._keys, entry_id.decode(), fields, attempt)
            if claim is not None:
                claims.append(claim)
        return claims

    async def _with_attempts(self, page: list[broker.Entry]) -> list[Claim]:
        attempts = await broker.call(
            self._redis,
            self._keys,
            "attempts",
            *(part for entry_id, fields in page for part in (entry_id, fields.get(b"key", b""))),
        )
        claims = []
        for (entry_id, fields), attempt in zip(page, attempts, strict=True):
            # An entry that was claimed, but whose ticket has moved on since, is nobody's.
            if attempt:
                claim = await decode_claim(self._redis, self._keys, entry_id, fields, attempt)
                if claim is not None:
                    claims.append(claim)
        return claims


async def expire(redis: Redis, job: JobRef, lease_ms: int, *, max_attempts: int) -> int:
    """Puts tickets whose site lease ran out back into the queue, for whoever is free. Returns how many ran out.

    One without attempts left ends as attempts_exhausted.
    """
    keys = JobKeys(job)
    cursor, total = b"0-0", 0
    while True:
        cursor, back = await broker.call(redis, keys, "expire", lease_ms, cursor, _CALL_TICKETS, max_attempts)
        total += int(back)
        if cursor == b"0-0":
            return total
