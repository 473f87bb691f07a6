"""From closed groups to a batch, and from a batch to what the trainer takes.

A batch is `groups_per_step` groups in the order in which they closed, late members behind them, and groups of the
replay buffer behind those; after a crash it is what the batch record says, as long as that can be had.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from functools import partial

import structlog

from longshore.learner import metrics
from longshore.learner.batch_log import BatchLog, BatchRecord
from longshore.learner.credit.batch import Again, CreditedBatch, credit_batch, group_has_signal
from longshore.learner.disk import when_there_is_room
from longshore.learner.groups import Ending, Group, LateMember
from longshore.learner.ledger import TRAINED
from longshore.learner.parts import Parts
from longshore.learner.replay.buffer import Replayed
from longshore.learner.replay.strategies import age_weight
from longshore.learner.statistics import rewards_of
from longshore.types import Rollout

log = structlog.get_logger()

NO_SIGNAL = "zero_variance"
NOT_FINITE = "not_finite"
# Batches' worth of groups that one batch may pass over because their rewards are equal, before it takes such too.
PASSED_OVER_BATCHES = 10


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one train step is made of."""

    groups: list[Group]
    late: list[LateMember]
    # Trained on before.
    replayed: list[Replayed] = dataclasses.field(default_factory=list)


class Batches:
    """Batches of one learner incarnation."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger, self._train, self._buffer = parts.ledger, parts.spec.train, parts.replay
        self._labels = (parts.job.project, parts.job.job)
        self._log = BatchLog(parts.run_dir / "learner" / "batches.jsonl")
        # Batches recorded after the checkpoint that this incarnation started from, to be taken again as they were.
        self.replay: list[BatchRecord] = self._log.after(parts.progress.step)
        # Of the first of them, once they were read.
        self._recalled: list[Replayed] | None = None
        # Since the last batch: how many groups were passed over, and which of those in line need no second look.
        self._passed_over = 0
        self._wanted: set[int] = set()
        self._hold()

    async def take(self) -> tuple[Batch | None, list[Ending]]:
        """The next batch, or None while too few groups have closed; and endings of late tickets without a rollout, and
        of groups that were passed over."""
        if self.replay:
            return await self._take_recorded(), []
        passed = self._pass_over() if self._train.zero_variance == "resample" else []
        if self._ledger.num_ready < self._train.groups_per_step:
            return None, passed
        late, endings = self._ledger.take_late(self._train.batch_size)
        groups = self._ledger.take_ready(self._train.groups_per_step)
        self._passed_over = 0
        self._wanted.clear()
        return Batch(groups, late, await self._draw()), passed + endings

    async def record(self, number: int, batch: Batch) -> None:
        """Returns when the batch is on disk (law 5)."""
        keys = [f"{group.group_id}.{index}" for group in batch.groups for index, _ in group.members]
        late = tuple(member.key for member in batch.late)
        again = [(key, item.use) for item in batch.replayed for key in item.entry.keys]
        uses = (*((key, 1) for key in (*keys, *late)), *again)
        groups = tuple(group.group_id for group in batch.groups)
        record = BatchRecord(number, self._parts.link.epoch, groups, uses, late)
        await when_there_is_room(lambda: self._log.append(record), "a batch record")

    def credit(self, batch: Batch) -> CreditedBatch:
        """The batch's sequences with their advantages. What has no signal has no gradient and is left out."""
        groups = [[rollout for _, rollout in group.members] for group in batch.groups]
        late = [(member.rollout, member.baseline) for member in batch.late]
        return credit_batch(groups, late, self._train, [self._again(item) for item in batch.replayed])

    async def settle(
        self, batch: Batch, credited: CreditedBatch, ess: float | None = None, spoilt: bool = False
    ) -> list[Ending]:
        """Closes the books on a batch, before its version is published.

        Args:
            batch: as it was taken.
            credited: what was made of it.
            ess: effective share of its replayed tokens; None: it had none.
            spoilt: its gradient was no number, so that it changed nothing: it is accounted, and not trained on.
        """
        outcome = NOT_FINITE if spoilt else TRAINED
        kept = [
            [rollout for _, rollout in group.members]
            for group, signal in zip(batch.groups, credited.signals, strict=True)
            if signal and not spoilt
        ]
        for group in batch.groups:
            self._parts.tasks_known.observe(group.task.task_id, rewards_of(group))
        endings: list[Ending] = []
        for member, signal in zip(batch.late, credited.late_signals, strict=True):
            endings.append(self._ledger.settle_late(member.group_id, member.index, outcome if signal else NO_SIGNAL))
        metrics.LATE.labels(*self._labels).inc(len(batch.late))
        for group, signal, rewards in zip(batch.groups, credited.signals, credited.rewards, strict=True):
            endings += self._ledger.settle(group, outcome if signal else NO_SIGNAL, rewards)
        await self._keep(batch.replayed, kept, ess, spoilt)
        return endings

    def metrics(self, batch: Batch) -> dict[str, float]:
        """What the line of a step says of its replayed groups, and of the tasks; after `settle`."""
        found = self._parts.tasks_known.metrics()
        if self._buffer is not None:
            uses = [item.use for item in batch.replayed]
            found["replay/groups"] = float(len(uses))
            found["replay/rollouts"] = float(sum(len(item.rollouts) for item in batch.replayed))
            found["replay/mean_use"] = sum(uses) / max(1, len(uses))
            found["replay/kept_groups"] = float(len(self._buffer))
            found["replay/kept_bytes"] = float(self._buffer.num_bytes)
            found["replay/reach"] = self._buffer.reach.value
        return found

    def settle_empty(self) -> tuple[int, list[Ending]]:
        """Accounts for groups all of whose tickets ended without a rollout. Returns how many there were."""
        empty = self._ledger.take_empty()
        return len(empty), [ending for group in empty for ending in self._ledger.settle(group, NO_SIGNAL)]

    # -- groups without signal ---------------------------------------------------------------------------------------

    def _pass_over(self) -> list[Ending]:
        """Accounts for groups that have no gradient, so that others are issued in their place (DAPO); bounded, for a
        policy may have learned all there is."""
        room = PASSED_OVER_BATCHES * self._train.groups_per_step - self._passed_over
        passed = self._ledger.take_ready_where(self._is_unwanted, room)
        self._passed_over += len(passed)
        metrics.PASSED_OVER.labels(*self._labels).inc(len(passed))
        for group in passed:
            self._parts.tasks_known.observe(group.task.task_id, rewards_of(group))
        return [ending for group in passed for ending in self._ledger.settle(group, NO_SIGNAL)]

    def _is_unwanted(self, group: Group) -> bool:
        if group.group_id not in self._wanted and group_has_signal([item for _, item in group.members], self._train):
            self._wanted.add(group.group_id)
        return group.group_id not in self._wanted

    # -- replay ------------------------------------------------------------------------------------------------------

    async def _draw(self) -> list[Replayed]:
        if self._buffer is None or self._train.replay is None:
            return []
        progress, share = self._parts.progress, self._train.replay.share
        most = max(1, round(share / (1.0 - share) * self._train.groups_per_step))
        return await asyncio.to_thread(self._buffer.take, progress.step + 1, progress.version, most)

    def _again(self, item: Replayed) -> Again:
        assert self._train.replay is not None
        age = item.entry.age(self._parts.progress.version)
        return Again(item.rollouts, item.use, age_weight(age, self._train.replay.half_life))

    async def _keep(
        self, replayed: Sequence[Replayed], fresh: Sequence[list[Rollout]], ess: float | None, spoilt: bool
    ) -> None:
        """Counts the uses of what was replayed, and offers the buffer what was trained on for the first time."""
        if self._buffer is None:
            return
        progress = self._parts.progress
        self._buffer.settle(progress.version, replayed, ess, spoilt)
        for rollouts in fresh:
            offer = partial(self._buffer.offer, progress.step, progress.version, rollouts)
            await when_there_is_room(offer, "a group to be replayed")

    def _hold(self) -> None:
        if self._buffer is not None:
            self._buffer.hold(group for record in self.replay for group, _ in record.replayed)

    async def _take_recorded(self) -> Batch | None:
        record = self.replay[0]
        try:
            if self._recalled is None:
                self._recalled = await self._recall(record)
            taken = self._ledger.take_recorded(record.groups, record.members, record.late_members)
        except LookupError as error:
            # Only after a fall-back to an older checkpoint, whose successor's rollouts had been acknowledged.
            log.warning("recorded batches cannot be had again", step=record.step, reason=str(error))
            self.replay.clear()
            self._recalled = None
            self._hold()
            return None
        if taken is None:
            return None
        self.replay.pop(0)
        replayed, self._recalled = self._recalled, None
        self._hold()
        return Batch(*taken, replayed)

    async def _recall(self, record: BatchRecord) -> list[Replayed]:
        if not record.replayed:
            return []
        if self._buffer is None:
            raise LookupError("the job replays nothing any more")
        return await asyncio.to_thread(self._buffer.take_recorded, record.replayed)
