"""A site without a model: claims tickets and answers them with rollouts made from the tickets' keys alone.

What it delivers depends on nothing but the ticket, so two runs of a learner over it must end with the same bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib

from longshore.errors import Fenced, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rollout_queue.tickets import Claim, TicketQueue
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

    async def run(self) -> None:
        while True:
            try:
                await self._tickets.setup()
                while True:
                    claims = await self._tickets.claim("simulated", 16, 100)
                    claims += await self._tickets.take_over("simulated", 16, lease_ms=1000)
                    for claim in claims:
                        await self._answer(claim)
            except Unavailable:
                await asyncio.sleep(0.1)

    async def _answer(self, claim: Claim) -> None:
        key = claim.ticket.ref.key
        if self.refusing and claim.ticket.purpose is Purpose.TRAIN:
            await self._tickets.reject(claim, "verifier_failed", "it always fails")
            return
        with contextlib.suppress(Fenced):
            if await self._rollouts.deliver(claim, rollout_to_bytes(make_rollout(claim))):
                self.delivered[key] = self.delivered.get(key, 0) + 1

    async def close(self) -> None:
        await self._client.aclose()


def make_rollout(claim: Claim) -> Rollout:
    """Two to five letters and an end; the reward is a hash of the ticket's key, so most groups have signal."""
    ticket = claim.ticket
    number = int.from_bytes(hashlib.sha256(ticket.ref.key.encode()).digest()[:4], "big")
    reply = (*(10 + (number >> shift) % 20 for shift in range(number % 4 + 2)), EOS)
    version = ticket.version.min_version if ticket.version and ticket.version.min_version is not None else 0
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
        verdicts=(Verdict(float(number % 2), "simulated@1"),),
    )
