"""The learner's job, from first light to summary. Read `run` first, then `_train_step`.

    consumes   deliveries of rollouts            waits for   the next `groups_per_step` groups to close, whichever
    produces   tickets, policy versions, events  unblocked by actors delivering, or tickets ending for a reason

It never waits for a particular rollout, except when it replays a batch that was recorded before a crash.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from longshore.errors import ConfigError, Interrupted
from longshore.learner.batches import Batch, Batches
from longshore.learner.broker_link import Cancelled
from longshore.learner.credit.batch import CreditedBatch
from longshore.learner.durability import Durability
from longshore.learner.evaluations import AFTER, BEFORE, Evaluations
from longshore.learner.issuer import Issuer
from longshore.learner.parts import Parts
from longshore.learner.publisher import Lineage
from longshore.learner.statistics import batch_metrics, staleness_of
from longshore.learner.upkeep import Upkeep

BLOCK_MS = 200
# Between two looks at what has come home during a train step.
TRAINING_POLL_S = 0.05
QUIET_S = 60.0
# Batches' worth of groups that may come to nothing, one after another, before the job is given up.
EMPTY_BATCHES = 4
# Train steps that may come to nothing, one after another, because their gradients are no numbers.
SPOILT_IN_A_ROW = 8


class LearnerLoop:
    """Runs one job to its end. One instance is one learner incarnation."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.spec = parts.spec
        self.ledger, self.progress, self.reporter = parts.ledger, parts.progress, parts.reporter
        self.issuer = Issuer(parts)
        self.batches = Batches(parts)
        self.durability = Durability(parts)
        self.upkeep = Upkeep(parts, self.issuer, self.durability)
        self.evaluations = Evaluations(parts, self.issuer, self.durability)
        self._empty_in_a_row = self._spoilt_in_a_row = 0

    async def run(self) -> str:
        """Trains until the job is done. Returns its final state: "succeeded" or "cancelled".

        Raises:
            Interrupted: told to stop before the end; a later incarnation goes on.
            Fenced: a later incarnation has taken over.
        """
        await self.reporter.rewind(self.progress.step)
        self.issuer.restore()
        try:
            await self.upkeep.begin()
            await self.issuer.issue()
            await self.evaluations.stand_still(BEFORE, self._wait)
            await self.reporter.phase("train")
            while self.progress.step < self.spec.train.steps:
                await self._train_step()
            await self.durability.checkpoint()
            await self.evaluations.stand_still(AFTER, self._wait)
        except Cancelled:
            await self._end("cancelled")
            return "cancelled"
        except Interrupted:
            # Not needed for safety: it spares the next incarnation the replay.
            await self.durability.checkpoint()
            await self.durability.settled()
            raise
        await self._end("job_finished")
        return "succeeded"

    async def _train_step(self) -> None:
        clock = time.monotonic()
        batch = await self._next_batch()
        waited = time.monotonic() - clock
        number, version = self.progress.step + 1, self.progress.version
        await self.batches.record(number, batch)
        credited = self.batches.credit(batch)
        clock = time.monotonic()
        step = asyncio.to_thread(self.parts.trainer.step, number, credited.sequences, version)
        results = await self._while_taking_in(step)
        trained = time.monotonic() - clock
        self.progress.step = number
        # Settling takes the rollouts out of the books: what is told of them is looked at first.
        told = batch_metrics(batch.groups, batch.late, version)
        self.progress.add_staleness(staleness_of(batch.groups, batch.late, version))
        spoilt = await self._is_spoilt(number, results, credited)
        self.durability.add(await self.batches.settle(batch, credited, results.get("replay/ess"), spoilt))
        told |= self.batches.metrics(batch)
        clock = time.monotonic()
        await self.evaluations.look()
        told |= self.evaluations.metrics()
        is_evaluated = self.evaluations.is_due(number)
        await self._publish(number, pinned=is_evaluated)
        # The version is on its way, so the batch counts as consumed and its places are free.
        await self.issuer.issue()
        if is_evaluated:
            await self.evaluations.begin(number)
        times = {"wait_for_batch": waited, "forward_backward": trained, "publish": time.monotonic() - clock}
        await self.reporter.step(self.progress, self.ledger, told, results, times)
        is_due = number % self.spec.train.checkpoint_every == 0
        if (is_due or self.durability.overdue) and number < self.spec.train.steps:
            await self.durability.checkpoint()

    async def _is_spoilt(self, number: int, results: dict[str, float], credited: CreditedBatch) -> bool:
        """Whether a step's gradient was no number, so that it was not taken: says of which rollouts that came."""
        if not results.get("optim/skipped"):
            self._spoilt_in_a_row = 0
            return False
        self._spoilt_in_a_row += 1
        positions = self.parts.trainer.not_finite
        whose = [credited.rollout_ids[position] for position in positions] or credited.rollout_ids
        await self.reporter.spoilt(number, whose, in_logprobs=bool(positions))
        if self._spoilt_in_a_row >= SPOILT_IN_A_ROW:
            raise ConfigError(
                f"the gradients of {self._spoilt_in_a_row} train steps in a row were not finite; the last one's "
                f"rollouts are in learner/not_finite.jsonl: lower train.learning_rate, or see what they have in common"
            )
        return True

    async def _while_taking_in(self, step: Coroutine[Any, Any, dict[str, float]]) -> dict[str, float]:
        """Runs a train step and meanwhile takes in what comes home, so that the next batch need not wait for it."""
        training = asyncio.create_task(step)
        try:
            while not training.done():
                await self.parts.intake.read(0)
                await asyncio.wait([training], timeout=TRAINING_POLL_S)
        finally:
            # The thread goes on whatever happens here; nobody else may touch the policy before it has ended.
            await asyncio.wait([training])
        return await training

    async def _next_batch(self) -> Batch:
        quiet_since = time.monotonic()
        # Also where there is always a batch to train on.
        await self._look_up()
        while True:
            batch, endings = await self.batches.take()
            self.durability.add(endings)
            if batch is not None:
                self._empty_in_a_row = 0
                return batch
            if await self._wait():
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > QUIET_S:
                quiet_since = time.monotonic()
                await self._say_quiet()
            await self._replace_empty()

    async def _wait(self) -> int:
        """One turn of every wait: orders, upkeep, what comes home. Returns how many entries came."""
        await self._look_up()
        return await self.parts.intake.read(BLOCK_MS)

    async def _look_up(self) -> None:
        await self.parts.link.check_orders(self.parts.stop)
        await self.upkeep.run()

    async def _say_quiet(self) -> None:
        if self.durability.anything_waits:
            # A site whose spool is full of what we have trained on can send nothing more until it is covered.
            await self.durability.checkpoint()
        awaiting = self.ledger.num_awaiting
        out = self.ledger.num_out - awaiting
        await self.reporter.warn(
            f"no rollout has come home for {QUIET_S:.0f} s; {out} tickets are out, {awaiting} await their verdicts"
        )

    async def _replace_empty(self) -> None:
        """A group all of whose tickets ended without a rollout is accounted, and another is issued for it."""
        number, endings = self.batches.settle_empty()
        self.durability.add(endings)
        if number:
            self._empty_in_a_row += number
            if self._empty_in_a_row > EMPTY_BATCHES * self.spec.train.groups_per_step:
                # Whatever it is (a verifier that always fails, prompts that never fit), more tickets will not mend it.
                raise ConfigError(
                    f"{self._empty_in_a_row} groups in a row ended without a single rollout; tickets ended as "
                    f"{self.ledger.accounted}: see the actors' logs and the dead letters"
                )
        # Also for groups whose rollouts all await their verdicts: they have left their places.
        await self.issuer.issue()

    # -- versions, end -----------------------------------------------------------------------------------------------

    async def _publish(self, number: int, *, pinned: bool) -> None:
        lineage = Lineage(number, self.parts.link.epoch, self.progress.version)
        policy, wanted = self.parts.trainer.policy, self.progress.version + 1
        version = await self.parts.publisher.publish(policy, wanted, lineage, pinned=pinned)
        self.progress.version = version
        self.parts.intake.newest_version = self.parts.publisher.newest

    async def _end(self, reason: str) -> None:
        """Accounts for everything that is still out, durably, and tells the broker."""
        await self.parts.publisher.wait()
        self.durability.add(self.ledger.settle_all(reason))
        await self.durability.checkpoint()
        await self.durability.settled()
        await self.parts.link.close(reason)
        await self.upkeep.end()
