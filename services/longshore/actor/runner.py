"""An actor's loops: tickets in, rollouts out.

| loop           | consumes                       | produces         | waits for                                       |
| `_intake_loop` | queued tickets, expired leases | attempts         | a free place; a ticket, for BLOCK_MS at most    |
| `_renew_loop`  | claims in progress             | longer leases    | a third of the lease time                       |
| `_attempt`     | one claim                      | one delivery     | generator, environment, verifier, broker        |

A lease that is lost cancels its attempt. While the outbox has no room, nothing is claimed. When told to stop, the
intake ends, attempts get `drain_s` seconds, and the rest goes back to the queue. Knows queues by their Protocols, and
nothing of gRPC or redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog

from longshore.actor.episode import AttemptFailed
from longshore.actor.outbox import Finished
from longshore.actor.retry import persist
from longshore.errors import Fenced, Rejected, Unavailable
from longshore.rollout_queue.tickets import DRAIN, UNAVAILABLE, Claim
from longshore.rpc.process import wait_or_stop

T = TypeVar("T")

BLOCK_MS = 1000
# Rollouts end in bursts; a claim for several costs as much as one for one.
_GATHER_S = 0.005
_GIVE_BACK_S = 5.0
# In lease times. A lease is renewed every third of its time: one that has not been for this long will not be, so its
# ticket goes on elsewhere before the lease is over. An attempt that is alive after all is fenced.
_LAPSED = 5 / 6
# How often lapsed leases are looked for.
_LOOK = 1 / 8
_ROOM_S = 0.25

log = structlog.get_logger()


class Tickets(Protocol):
    """What a runner needs of rollout_queue.TicketQueue."""

    async def setup(self) -> None: ...
    async def claim(self, actor: str, count: int, block_ms: int) -> list[Claim]: ...
    async def take_over(self, actor: str, count: int, lease_ms: int | None = None) -> list[Claim]: ...
    async def renew(self, actor: str, claims: list[Claim]) -> list[Claim]: ...
    async def give_back(self, claim: Claim, reason: str) -> None: ...
    async def reject(self, claim: Claim, reason: str, detail: str) -> None: ...


class Outbox(Protocol):
    """Takes finished rollouts; see actor.outbox.Outbox."""

    def has_room(self) -> bool: ...
    def holds(self, claim: Claim) -> bool: ...
    async def hand_in(self, claim: Claim, finished: Finished, is_lost: Callable[[], bool]) -> None: ...


Fence = tuple[str, int, str]
# Makes a claim's rollout.
Work = Callable[[Claim], Awaitable[Finished]]


@dataclass(frozen=True)
class RunnerLimits:
    """Bounds of a runner: attempts at a time, and seconds."""

    places: int
    lease_s: float
    drain_s: float
    broker_patience_s: float


class Observer(Protocol):
    """Told how attempts end, for metrics."""

    def started(self, running: int) -> None: ...
    def ended(self, outcome: str, seconds: float, running: int) -> None: ...


class Runner:
    """Runs attempts for one actor until told to stop."""

    def __init__(
        self, actor: str, tickets: Tickets, outbox: Outbox, work: Work, limits: RunnerLimits, observer: Observer
    ) -> None:
        self._actor = actor
        self._tickets = tickets
        self._outbox = outbox
        self._work = work
        self._limits = limits
        self._observer = observer
        self._running: dict[asyncio.Task[None], Claim] = {}
        # Attempts that are only being handed in: the broker may have closed their lease already.
        self._handing_in: set[Fence] = set()
        # Those whose lease the broker no longer knows: handed in, or really lost.
        self._lost: set[Fence] = set()
        self._freed = asyncio.Event()
        self._next_take_over = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set and the work is drained.

        Raises:
            Unavailable: the broker was away for longer than its patience. (In an ExceptionGroup.)
        """
        await self._broker(self._tickets.setup)
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(self._renew_loop(), name="renew")
            await self._intake_loop(group, stop)
            await self._drain()
            renewing.cancel()

    async def _intake_loop(self, group: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        while not stop.is_set():
            free = self._limits.places - len(self._running)
            if free <= 0:
                await self._wait_for_place(stop)
                continue
            if not self._outbox.has_room():
                await wait_or_stop(stop, _ROOM_S)
                continue
            for claim in await self._claim_or_stop(free, stop):
                task = group.create_task(self._attempt(claim), name=f"attempt-{claim.ticket.ref.key}")
                self._running[task] = claim
                task.add_done_callback(self._forget)

    async def _claim_or_stop(self, free: int, stop: asyncio.Event) -> list[Claim]:
        """While the broker is away, being told to stop ends the wait."""
        try:
            return await persist(partial(self._claim, free), self._limits.broker_patience_s, give_up=stop.is_set)
        except Unavailable:
            if stop.is_set():
                return []
            raise

    async def _claim(self, free: int) -> list[Claim]:
        """Expired leases first, looked for now and then; else tickets from the queue."""
        now = time.monotonic()
        if now >= self._next_take_over:
            # After the broker was away our own leases may look expired: not to be taken from ourselves.
            await self._renew()
            claims = await self._tickets.take_over(self._actor, free, int(self._limits.lease_s * _LAPSED * 1000))
            # More may be waiting than there were places.
            self._next_take_over = now if len(claims) == free else now + self._limits.lease_s * _LOOK
            if claims:
                log.info("took over", tickets=len(claims))
                return claims
        return await self._tickets.claim(self._actor, free, BLOCK_MS)

    async def _wait_for_place(self, stop: asyncio.Event) -> None:
        self._freed.clear()
        stopping, freed = asyncio.create_task(stop.wait()), asyncio.create_task(self._freed.wait())
        try:
            await asyncio.wait([stopping, freed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            freed.cancel()
        await asyncio.sleep(_GATHER_S)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._freed.set()

    async def _renew_loop(self) -> None:
        while True:
            await asyncio.sleep(self._limits.lease_s / 3)
            await self._broker(self._renew)

    async def _renew(self) -> None:
        """Renews the leases of all attempts and cancels those that have lost theirs."""
        held = {claim.fence: task for task, claim in self._running.items()}
        claims = list(self._running.values())
        if not claims:
            return
        for claim in await self._tickets.renew(self._actor, claims):
            if claim.fence in self._handing_in:
                self._lost.add(claim.fence)
                continue
            if held[claim.fence].done():
                continue
            log.warning("lease lost", ticket=claim.ticket.ref.key, attempt=claim.attempt)
            held[claim.fence].cancel()

    async def _attempt(self, claim: Claim) -> None:
        """One claim to its end. Only the broker's absence, and a cancellation, leave here as exceptions."""
        started, outcome = time.monotonic(), "cancelled"
        self._observer.started(len(self._running))
        try:
            outcome = await self._try(claim)
        finally:
            self._handing_in.discard(claim.fence)
            self._lost.discard(claim.fence)
            self._observer.ended(outcome, time.monotonic() - started, len(self._running) - 1)

    async def _try(self, claim: Claim) -> str:
        try:
            finished = await self._made(claim)
        except Fenced as error:
            log.warning("lease lost", ticket=claim.ticket.ref.key, attempt=claim.attempt, reason=str(error))
            return "fenced"
        except Rejected as error:
            log.warning("rejected", ticket=claim.ticket.ref.key, reason=error.reason, detail=error.detail)
            await self._broker(partial(self._tickets.reject, claim, error.reason, error.detail))
            return "rejected"
        except (AttemptFailed, Unavailable) as error:
            reason = error.reason if isinstance(error, AttemptFailed) else UNAVAILABLE
            return await self._failed(claim, reason, error)
        except Exception as error:
            # An attempt's boundary: a bug that one task meets must not end the others.
            log.exception("attempt failed", ticket=claim.ticket.ref.key)
            return await self._failed(claim, "error", error)
        return await self._hand_in(claim, finished)

    async def _made(self, claim: Claim) -> Finished:
        try:
            return await self._work(claim)
        finally:
            self._handing_in.add(claim.fence)

    async def _hand_in(self, claim: Claim, finished: Finished) -> str:
        try:
            await self._outbox.hand_in(claim, finished, lambda: claim.fence in self._lost)
        except Fenced as error:
            log.info("rollout is of no use", reason=str(error))
            return "fenced"
        except Rejected as error:
            await self._broker(partial(self._tickets.reject, claim, error.reason, error.detail))
            return "rejected"
        return "delivered"

    async def _failed(self, claim: Claim, reason: str, error: Exception) -> str:
        log.warning("given back", ticket=claim.ticket.ref.key, reason=reason, detail=str(error))
        await self._broker(partial(self._tickets.give_back, claim, reason))
        return "given_back"

    async def _drain(self) -> None:
        """Lets attempts finish for `drain_s`, then gives the rest back without counting the attempt.

        What is spooled is not given back: our next life delivers it, or another takes the ticket over in time.
        """
        if self._running:
            await asyncio.wait(list(self._running), timeout=self._limits.drain_s)
        left = dict(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(list(left), timeout=_GIVE_BACK_S)
            log.info("drained", given_back=len(left))
        with contextlib.suppress(TimeoutError, Unavailable):
            # Should the broker be away, the leases run out by themselves.
            async with asyncio.timeout(_GIVE_BACK_S):
                for claim in left.values():
                    if not self._outbox.holds(claim):
                        await self._tickets.give_back(claim, DRAIN)

    async def _broker(self, call: Callable[[], Awaitable[T]]) -> T:
        return await persist(call, self._limits.broker_patience_s)


async def until_stopped(
    call: Callable[[], Awaitable[T]], stop: asyncio.Event, what: str, pause_s: float = 1.0
) -> T | None:
    """Repeats a call that fails while its peer is not ready yet, for as long as the process lives; None: stopped."""
    while not stop.is_set():
        try:
            return await call()
        except Unavailable as error:
            log.info("waiting", what=what, reason=str(error))
        await wait_or_stop(stop, pause_s)
    return None
