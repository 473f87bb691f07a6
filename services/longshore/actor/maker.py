"""From a claim to a serialised rollout: plays the episode, has it scored, puts the record together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from longshore.actor.clients import GeneratorClient, VerifierClient
from longshore.actor.episode import Surroundings, Transcript, play
from longshore.errors import Rejected
from longshore.rollout_queue.tickets import Claim
from longshore.rpc.convert_rollout import rollout_to_bytes
from longshore.tasks.rendering import Renderer
from longshore.types import Rollout, Sampling, Verdict


@dataclass(frozen=True)
class RolloutMaker:
    """What every attempt of one actor needs."""

    site: str
    actor: str
    environment: str
    max_turns: int
    renderer: Renderer
    surroundings: Callable[[], Surroundings]
    generator: GeneratorClient
    verifier: VerifierClient
    count_tokens: Callable[[int], None]

    async def make(self, claim: Claim) -> bytes:
        """One attempt.

        Raises:
            Rejected: no attempt at this ticket can succeed, or its reply cannot be scored.
            AttemptFailed, Unavailable: another attempt may.
        """
        started_at, ticket = time.time(), claim.ticket
        if ticket.task.environment != self.environment:
            raise Rejected("environment", f"this job runs {self.environment}, not {ticket.task.environment}")
        stops = tuple(sorted({*ticket.sampling.stop_token_ids, *self.renderer.stop_token_ids}))
        sampling = replace(ticket.sampling, stop_token_ids=stops)
        generate = partial(self.generator.generate, ticket, claim.attempt)
        transcript = await play(ticket.task, sampling, self.max_turns, self.renderer, self.surroundings(), generate)
        verdict = await self.verifier.verify(ticket, claim.attempt, transcript.score_request(ticket.task))
        rollout = self._rollout(claim, sampling, transcript, verdict, started_at)
        self.count_tokens(rollout.num_sampled)
        return rollout_to_bytes(rollout)

    def _rollout(
        self, claim: Claim, sampling: Sampling, transcript: Transcript, verdict: Verdict | None, started_at: float
    ) -> Rollout:
        return Rollout(
            ref=claim.ticket.ref,
            attempt=claim.attempt,
            purpose=claim.ticket.purpose,
            task_id=claim.ticket.task.task_id,
            segments=(transcript.segment,),
            turns=tuple(transcript.turns),
            sampling=(sampling,),
            engines=tuple(transcript.engines),
            finish=transcript.finish,
            started_at=started_at,
            finished_at=time.time(),
            site=self.site,
            actor=self.actor,
            verdicts=(verdict,) if verdict else (),
        )
