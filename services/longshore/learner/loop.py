"""The learner's job, from first light to summary. Read `run` first, then `_train_step`.

    consumes   deliveries of rollouts            waits for   the next `groups_per_step` groups to close, whichever
    produces   tickets, policy versions, events  unblocked by actors delivering, or tickets ending for a reason

It never waits for a particular rollout, except when it replays a batch that was recorded before a crash.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from longshore.config import JobSpec
from longshore.errors import ConfigError, Interrupted
from longshore.learner.admission import Admission
from longshore.learner.advantage import group_advantages, has_signal
from longshore.learner.batch import TrainSequence, sequences_of
from longshore.learner.batch_log import BatchLog, BatchRecord
from longshore.learner.broker_link import BrokerLink, Cancelled
from longshore.learner.checkpoint import take_snapshot, write_checkpoint
from longshore.learner.intake import Intake, ends_of
from longshore.learner.ledger import TRAINED, Ending, Group, Ledger, tickets_of
from longshore.learner.progress import Progress
from longshore.learner.publisher import Lineage, Publisher
from longshore.learner.reporter import Reporter
from longshore.learner.statistics import rewards_of, staleness_of
from longshore.learner.trainer import Trainer
from longshore.tasks.source import TrainCursor
from longshore.types import JobRef, Purpose, Sampling, Task, Ticket, TicketRef, VersionConstraint

log = structlog.get_logger()

BLOCK_MS = 200
ZERO_VARIANCE = "zero_variance"
EVALUATION = "evaluation"
QUIET_S = 60.0
# Batches' worth of groups that may come to nothing, one after another, before the job is given up.
EMPTY_BATCHES = 4


@dataclass
class Parts:
    """What the loop works with; `service.py` makes them."""

    job: JobRef
    spec: JobSpec
    run_dir: Path
    link: BrokerLink
    publisher: Publisher
    trainer: Trainer
    ledger: Ledger
    intake: Intake
    progress: Progress
    cursor: TrainCursor
    heldout: list[Task]
    stop: asyncio.Event


class LearnerLoop:
    """Runs one job to its end. One instance is one learner incarnation."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.spec = parts.spec
        self.link, self.ledger, self.progress = parts.link, parts.ledger, parts.progress
        self.admission = Admission(parts.spec.train.groups_per_step, parts.spec.train.target_staleness)
        self.batches = BatchLog(parts.run_dir / "learner" / "batches.jsonl")
        self.reporter = Reporter(parts.job, parts.spec, parts.run_dir, parts.link.publish)
        # Batches recorded after the checkpoint that this incarnation started from, to be taken again as they were.
        self.replay: list[BatchRecord] = self.batches.after(self.progress.step)
        # Endings whose effect no durable checkpoint contains yet.
        self._unacknowledged: list[Ending] = []
        self._checkpointing: asyncio.Task[None] | None = None
        self._empty_in_a_row = 0
        self.link.on_loss = self._say_again

    async def run(self) -> str:
        """Trains until the job is done. Returns its final state: "succeeded" or "cancelled".

        Raises:
            Interrupted: told to stop before the end; a later incarnation goes on.
            Fenced: a later incarnation has taken over.
        """
        self.reporter.rewind(self.progress.step)
        try:
            await self._say_again()
            await self._issue()
            await self._evaluate("before")
            await self.reporter.phase("train")
            while self.progress.step < self.spec.train.steps:
                await self._train_step()
            await self._checkpoint()
            await self._evaluate("after")
        except Cancelled:
            await self._end("cancelled")
            return "cancelled"
        except Interrupted:
            # Not needed for safety: it spares the next incarnation the replay.
            await self._checkpoint()
            await self._checkpointed()
            raise
        await self._end("job_finished")
        return "succeeded"

    async def _train_step(self) -> None:
        clock = time.monotonic()
        groups = await self._next_batch()
        waited = time.monotonic() - clock
        number, version = self.progress.step + 1, self.progress.version
        await self._record(number, groups)
        sequences = self._credit(groups)
        clock = time.monotonic()
        results = await asyncio.to_thread(self.parts.trainer.step, number, sequences, version)
        trained = time.monotonic() - clock
        self.progress.step = number
        self._settle(groups)
        self.progress.add_staleness(staleness_of(groups, version))
        clock = time.monotonic()
        await self._publish(number)
        # The version is on its way, so the batch counts as consumed and its places are free.
        await self._issue()
        times = {"wait_for_batch": waited, "forward_backward": trained, "publish": time.monotonic() - clock}
        await self.reporter.step(self.progress, self.ledger, groups, version, results, times)
        if number % self.spec.train.checkpoint_every == 0 and number < self.spec.train.steps:
            await self._checkpoint()

    # -- batches -----------------------------------------------------------------------------------------------------

    async def _next_batch(self) -> list[Group]:
        quiet_since = time.monotonic()
        while True:
            groups = self._take()
            if groups is not None:
                self._empty_in_a_row = 0
                return groups
            await self.link.check_orders(self.parts.stop)
            if await self.parts.intake.read(BLOCK_MS):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > QUIET_S:
                quiet_since = time.monotonic()
                out = sum(len(group.missing) for group in self.ledger.open.values())
                await self.reporter.warn(f"no rollout has come home for {QUIET_S:.0f} s; {out} tickets are out")
            await self._replace_empty()

    def _take(self) -> list[Group] | None:
        """The next batch, or None while too few groups have closed; a recorded batch exactly as it was."""
        if self.replay and self.replay[0].step == self.progress.step + 1:
            groups = self.ledger.take(self.replay[0].groups)
            if groups is not None:
                self.replay.pop(0)
            return groups
        if self.ledger.num_ready < self.spec.train.groups_per_step:
            return None
        return self.ledger.take_ready(self.spec.train.groups_per_step)

    async def _replace_empty(self) -> None:
        """A group all of whose tickets ended without a rollout is accounted, and another is issued for it."""
        empty = self.ledger.take_empty()
        for group in empty:
            self._unacknowledged += self.ledger.settle(group, ZERO_VARIANCE)
        if not empty:
            return
        self._empty_in_a_row += len(empty)
        if self._empty_in_a_row > EMPTY_BATCHES * self.spec.train.groups_per_step:
            # Whatever it is (a verifier that always fails, prompts that never fit), more tickets will not mend it.
            raise ConfigError(
                f"{self._empty_in_a_row} groups in a row ended without a single rollout; tickets ended as "
                f"{self.ledger.accounted}: see the actors' logs and the dead letters"
            )
        await self._issue()

    async def _record(self, number: int, groups: list[Group]) -> None:
        uses = tuple((f"{group.group_id}.{index}", 1) for group in groups for index, _ in group.members)
        record = BatchRecord(number, self.link.epoch, tuple(group.group_id for group in groups), uses)
        await asyncio.to_thread(self.batches.append, record)

    def _credit(self, groups: list[Group]) -> list[TrainSequence]:
        """The batch's sequences with their advantages. Groups without signal have no gradient and are left out."""
        sequences: list[TrainSequence] = []
        for group in groups:
            rewards = rewards_of(group)
            if not has_signal(rewards):
                continue
            advantages = group_advantages(rewards, self.spec.train.advantage)
            for (_, rollout), advantage in zip(group.members, advantages, strict=True):
                sequences += sequences_of(rollout, advantage)
        return sequences

    def _settle(self, groups: list[Group]) -> None:
        for group in groups:
            outcome = TRAINED if has_signal(rewards_of(group)) else ZERO_VARIANCE
            self._unacknowledged += self.ledger.settle(group, outcome)

    # -- tickets -----------------------------------------------------------------------------------------------------

    async def _issue(self) -> None:
        """Issues what admission allows (law 6)."""
        steps_left = self.spec.train.steps - self.progress.step
        in_flight = len(self.ledger.open_groups(Purpose.TRAIN))
        opened = [
            self.ledger.issue(self.parts.cursor.next(), Purpose.TRAIN, self.spec.train.group_size)
            for _ in range(self.admission.allowance(steps_left, in_flight))
        ]
        self.progress.cursor = self.parts.cursor.state
        await self._send(opened)

    async def _send(self, groups: list[Group]) -> None:
        await self.parts.intake.take_early()
        tickets = [self._ticket(group, index) for group, index in tickets_of(groups)]
        if tickets:
            await self.link.issue(tickets)

    def _ticket(self, group: Group, index: int) -> Ticket:
        pinned = group.purpose is Purpose.EVALUATION
        return Ticket(
            ref=TicketRef(self.parts.job, group.group_id, index),
            group_size=group.size,
            purpose=group.purpose,
            task=group.task,
            sampling=Sampling(self.spec.sampling.temperature, self.spec.sampling.max_new_tokens),
            learner_epoch=self.link.epoch,
            issued_at=time.time(),
            version=VersionConstraint(self.progress.version, self.progress.version) if pinned else None,
        )

    async def _say_again(self) -> None:
        """After a restart of this learner or of the broker: takes in what is unacknowledged, then issues again every
        ticket that is still out. Both are harmless where the broker had forgotten nothing."""
        await self.parts.intake.read_again()
        await self._send(list(self.ledger.open.values()))

    # -- evaluation --------------------------------------------------------------------------------------------------

    async def _evaluate(self, when: str) -> None:
        """Samples every held-out task once from the version just published; no train step is taken meanwhile."""
        if not self.parts.heldout or when in self.progress.evaluations:
            return
        await self.parts.publisher.wait()
        await self.reporter.phase(f"evaluate_{when}")
        groups = self.ledger.open_groups(Purpose.EVALUATION)
        if not groups:
            groups = [self.ledger.issue(task, Purpose.EVALUATION, 1) for task in self.parts.heldout]
        await self._send(groups)
        while not all(group.closed for group in groups):
            await self.link.check_orders(self.parts.stop)
            if await self.parts.intake.read(BLOCK_MS):
                await self.reporter.evaluation(when, groups, None)
        rewards = [reward for group in groups for reward in rewards_of(group)]
        for group in groups:
            self._unacknowledged += self.ledger.settle(group, EVALUATION)
        self.progress.evaluations[when] = sum(rewards) / max(1, len(rewards))
        await self.reporter.evaluation(when, groups, self.progress.evaluations[when])
        await self._checkpoint()

    # -- versions, checkpoints, end ----------------------------------------------------------------------------------

    async def _publish(self, number: int) -> None:
        lineage = Lineage(number, self.link.epoch, self.progress.version)
        version = await self.parts.publisher.publish(self.parts.trainer.policy, self.progress.version + 1, lineage)
        self.progress.version = self.parts.intake.newest_version = version

    async def _checkpoint(self) -> None:
        """Starts a checkpoint of this moment; the rollouts it covers are acknowledged once it is durable."""
        await self._checkpointed()
        state = {"ledger": self.ledger.state(), "progress": self.progress.state(), "epoch": self.link.epoch}
        snapshot = take_snapshot(self.parts.trainer, self.progress.step, state)
        covered, self._unacknowledged = self._unacknowledged, []

        async def write() -> None:
            await asyncio.to_thread(write_checkpoint, self.parts.run_dir / "learner" / "checkpoints", snapshot)
            await self.link.acknowledge(ends_of(covered))

        self._checkpointing = asyncio.create_task(write())

    async def _checkpointed(self) -> None:
        """Until the checkpoint before is durable and acknowledged. Raises what went wrong with it."""
        if self._checkpointing is not None:
            running, self._checkpointing = self._checkpointing, None
            await running

    async def _end(self, reason: str) -> None:
        """Accounts for everything that is still out, durably, and tells the broker."""
        await self.parts.publisher.wait()
        self._unacknowledged += self.ledger.settle_all(reason)
        await self._checkpoint()
        await self._checkpointed()
        await self.link.close(reason)
