"""From a claim to a serialised rollout: plays the episode, has it scored, puts the record together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from longshore.actor.beginning import Beginner
from longshore.actor.clients import GeneratorClient, VerifierClient
from longshore.actor.episode import Transcript, play
from longshore.actor.outbox import Finished
from longshore.errors import Rejected
from longshore.rollout_queue.tickets import Claim
from longshore.rpc.convert_rollout import rollout_to_bytes
from longshore.types import Rollout, Sampling, Verdict


@dataclass(frozen=True)
class RolloutMaker:
    """What every attempt of one actor needs."""

    site: str
    actor: str
    environment: str
    beginner: Beginner
    generator: GeneratorClient
    verifier: VerifierClient
    count_tokens: Callable[[int], None]

    async def make(self, claim: Claim) -> Finished:
        """One attempt, which goes on where an earlier one's journal ends.

        Raises:
            Rejected: no attempt at this ticket can succeed, or its reply cannot be scored.
            AttemptFailed, Unavailable: another attempt may.
            Fenced: another attempt has begun.
        """
        ticket = claim.ticket
        if ticket.task.environment != self.environment:
            raise Rejected("environment", f"this job runs {self.environment}, not {ticket.task.environment}")
        renderer, max_turns = self.beginner.renderer, self.beginner.max_turns
        stops = tuple(sorted({*ticket.sampling.stop_token_ids, *renderer.stop_token_ids}))
        sampling = replace(ticket.sampling, stop_token_ids=stops)
        begun = await self.beginner.begin(claim, sampling)
        generate = partial(self.generator.generate, ticket, claim.attempt)
        transcript = await play(
            ticket.task, sampling, max_turns, renderer, begun.surroundings, generate, begun.keeper, begun.behind
        )
        verdict = await self.verifier.verify(ticket, claim.attempt, transcript.score_request(ticket.task))
        rollout = self._rollout(claim, sampling, transcript, verdict, begun.started_at)
        self.count_tokens(rollout.num_sampled)
        return Finished(rollout_to_bytes(rollout, ticket.prompt_digest), awaiting_verdict=verdict is None)

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
