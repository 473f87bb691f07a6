"""A site without a model: claims tickets and answers them with rollouts made from the tickets' keys alone.

What it delivers depends on nothing but the ticket, so two runs of a learner over it must end with the same bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
from collections.abc import Callable
from dataclasses import replace

from longshore.errors import Conflict, Fenced, NotFound, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.rpc import convert
from longshore.rpc.convert_rollout import rollout_to_bytes
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    JobRef,
    Purpose,
    Rollout,
    SampledSpan,
    Sampling,
    Segment,
    TicketRef,
    Turn,
    Verdict,
)

EOS = 1


class SimulatedSite:
    """Answers every ticket of a job, in order, until its task is cancelled."""

    def __init__(self, url: str, job: JobRef) -> None:
        self._client = broker.connect(url, patience_s=5.0)
        self._tickets = TicketQueue(self._client, job)
        self._rollouts = RolloutQueue(self._client, job)
        # Ticket keys by how often each was delivered as new.
        self.delivered: dict[str, int] = {}
        # Whether every training ticket is refused, as by a verifier that always fails.
        self.refusing = False
        # Whose rollouts go home without a verdict, which follows after this many further tickets; None: nobody's.
        self.judged_later: Callable[[TicketRef], int | None] = lambda ref: None
        # The policy version that rollouts for training say they were made by.
        self.version: Callable[[], int] = lambda: 0
        self._answered = 0
        # (when, key), soonest first.
        self._unjudged: list[tuple[int, str]] = []

    async def run(self) -> None:
        while True:
            try:
                await self._tickets.setup()
                while True:
                    claims = await self._tickets.claim("simulated", 16, 100)
                    claims += await self._tickets.take_over("simulated", 16, lease_ms=1000)
                    for claim in claims:
                        await self._answer(claim)
                        await self._judge()
            except Unavailable:
                await asyncio.sleep(0.1)

    async def _answer(self, claim: Claim) -> None:
        key = claim.ticket.ref.key
        if self.refusing and claim.ticket.purpose is Purpose.TRAIN:
            await self._tickets.reject(claim, "verifier_failed", "it always fails")
            return
        delay = self.judged_later(claim.ticket.ref)
        rollout = make_rollout(claim, self.version())
        if delay is not None:
            rollout = replace(rollout, verdicts=())
        with contextlib.suppress(Fenced):
            if await self._rollouts.deliver(claim, rollout_to_bytes(rollout), awaiting_verdict=delay is not None):
                self.delivered[key] = self.delivered.get(key, 0) + 1
                self._answered += 1
                if delay is not None:
                    heapq.heappush(self._unjudged, (self._answered + delay, key))

    async def _judge(self) -> None:
        while self._unjudged and self._unjudged[0][0] <= self._answered:
            _, key = heapq.heappop(self._unjudged)
            # One that the job did not wait for any more, or that had its verdict.
            with contextlib.suppress(NotFound, Conflict):
                verdict = convert.verdict_to_proto(verdict_on(key)).SerializeToString()
                await self._rollouts.deliver_verdict(key, verdict)

    async def close(self) -> None:
        await self._client.aclose()


def make_rollout(claim: Claim, version: int = 0) -> Rollout:
    """Two to five letters and an end; the reward is a hash of the ticket's key, so most groups have signal."""
    ticket = claim.ticket
    number = _number(ticket.ref.key)
    reply = (*(10 + (number >> shift) % 20 for shift in range(number % 4 + 2)), EOS)
    if ticket.version and ticket.version.min_version is not None:
        version = ticket.version.min_version
    span = SampledSpan(version, tuple(-1.0 - (number >> i) % 7 / 10 for i in range(len(reply))))
    prompt = (8, 9, 10 + ticket.ref.group_id % 20, 2)
    return Rollout(
        ref=ticket.ref,
        attempt=claim.attempt,
        purpose=ticket.purpose,
        task_id=ticket.task.task_id,
        segments=(Segment("0", prompt + reply, (GivenSpan(len(prompt)), span)),),
        turns=(Turn("0", len(prompt), len(reply), FinishReason.STOP),),
        sampling=(Sampling(1.0, 8),),
        engines=(EngineFingerprint("simulated", "1", "float32", ""),),
        finish=FinishReason.STOP,
        started_at=1.0,
        finished_at=2.0,
        site="home",
        actor="simulated",
        verdicts=(verdict_on(ticket.ref.key),),
    )


def verdict_on(key: str) -> Verdict:
    """The verdict on a ticket's rollout, whenever it is given."""
    return Verdict(float(_number(key) % 2), "simulated@1")


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
