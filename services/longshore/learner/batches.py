"""From closed groups to a batch, and from a batch to what the trainer takes.

A batch is `groups_per_step` groups in the order in which they closed, and late members behind them; after a crash it
is what the batch record says, as long as that can be had.
"""

from __future__ import annotations

import dataclasses

import structlog

from longshore.learner import metrics
from longshore.learner.batch_log import BatchLog, BatchRecord
from longshore.learner.credit.batch import CreditedBatch, credit_batch
from longshore.learner.disk import when_there_is_room
from longshore.learner.groups import Ending, Group, LateMember
from longshore.learner.ledger import TRAINED
from longshore.learner.parts import Parts

log = structlog.get_logger()

NO_SIGNAL = "zero_variance"


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one train step is made of."""

    groups: list[Group]
    late: list[LateMember]


class Batches:
    """Batches of one learner incarnation."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger, self._train = parts.ledger, parts.spec.train
        self._labels = (parts.job.project, parts.job.job)
        self._log = BatchLog(parts.run_dir / "learner" / "batches.jsonl")
        # Batches recorded after the checkpoint that this incarnation started from, to be taken again as they were.
        self.replay: list[BatchRecord] = self._log.after(parts.progress.step)

    def take(self) -> tuple[Batch | None, list[Ending]]:
        """The next batch, or None while too few groups have closed; and endings of late tickets without a rollout."""
        if self.replay:
            return self._take_recorded(), []
        if self._ledger.num_ready < self._train.groups_per_step:
            return None, []
        late, endings = self._ledger.take_late(self._train.batch_size)
        return Batch(self._ledger.take_ready(self._train.groups_per_step), late), endings

    async def record(self, number: int, batch: Batch) -> None:
        """Returns when the batch is on disk (law 5)."""
        keys = [f"{group.group_id}.{index}" for group in batch.groups for index, _ in group.members]
        late = tuple(member.key for member in batch.late)
        uses = tuple((key, 1) for key in (*keys, *late))
        groups = tuple(group.group_id for group in batch.groups)
        record = BatchRecord(number, self._parts.link.epoch, groups, uses, late)
        await when_there_is_room(lambda: self._log.append(record), "a batch record")

    def credit(self, batch: Batch) -> CreditedBatch:
        """The batch's sequences with their advantages. What has no signal has no gradient and is left out."""
        groups = [[rollout for _, rollout in group.members] for group in batch.groups]
        late = [(member.rollout, member.baseline) for member in batch.late]
        return credit_batch(groups, late, self._train)

    def settle(self, batch: Batch, credited: CreditedBatch) -> list[Ending]:
        """Closes the books on a batch that was trained on."""
        endings: list[Ending] = []
        for member, has_signal in zip(batch.late, credited.late_signals, strict=True):
            outcome = TRAINED if has_signal else NO_SIGNAL
            endings.append(self._ledger.settle_late(member.group_id, member.index, outcome))
        metrics.LATE.labels(*self._labels).inc(len(batch.late))
        for group, has_signal, rewards in zip(batch.groups, credited.signals, credited.rewards, strict=True):
            endings += self._ledger.settle(group, TRAINED if has_signal else NO_SIGNAL, rewards)
        return endings

    def settle_empty(self) -> tuple[int, list[Ending]]:
        """Accounts for groups all of whose tickets ended without a rollout. Returns how many there were."""
        empty = self._ledger.take_empty()
        return len(empty), [ending for group in empty for ending in self._ledger.settle(group, NO_SIGNAL)]

    def _take_recorded(self) -> Batch | None:
        record = self.replay[0]
        try:
            taken = self._ledger.take_recorded(record.groups, record.members, record.late_members)
        except LookupError as error:
            # Only after a fall-back to an older checkpoint, whose successor's rollouts had been acknowledged.
            log.warning("recorded batches cannot be had again", step=record.step, reason=str(error))
            self.replay.clear()
            return None
        if taken is None:
            return None
        self.replay.pop(0)
        return Batch(*taken)
