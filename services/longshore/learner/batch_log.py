"""The batch record (law 5): what each train step was made of, durable before the step is taken.

One JSON line a step, synced to disk. After a crash the steps beyond the checkpoint are replayed from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from longshore.learner.durable_lines import append_line, read_lines


@dataclass(frozen=True)
class BatchRecord:
    """Example: BatchRecord(step=7, epoch=1, groups=(12, 9), uses=(("12.0", 1), ("12.1", 1), ("9.0", 1)))"""

    step: int
    epoch: int
    # In the order in which they were put together.
    groups: tuple[int, ...]
    # (rollout_id, use) of every rollout in the batch, in order: the groups', the late ones, and with a use above 1
    # those that were trained on before.
    uses: tuple[tuple[str, int], ...]
    # Rollouts whose verdict came after their group had been trained on.
    late: tuple[str, ...] = ()

    @property
    def members(self) -> list[tuple[int, int]]:
        """(group, index) of the rollouts of `groups`."""
        first = [key for key, use in self.uses if use == 1]
        return [_pair(key) for key in first[: len(first) - len(self.late)]]

    @property
    def late_members(self) -> list[tuple[int, int]]:
        """(group, index) of the late ones."""
        return [_pair(key) for key in self.late]

    @property
    def replayed(self) -> list[tuple[int, int]]:
        """(group, use) of the groups that were trained on before, in order."""
        # A dictionary for its order: each group's rollouts stand together.
        return list({(_pair(key)[0], use): None for key, use in self.uses if use > 1})


class BatchLog:
    """The records of one job, in a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: BatchRecord) -> None:
        """Returns when the record is on disk."""
        append_line(self.path, asdict(record))

    def after(self, step: int) -> list[BatchRecord]:
        """Records of the steps beyond `step`, in order. A last line that a crash tore is dropped from the file.

        Where a step was recorded twice (a record was written, its step never taken, and the job went on otherwise),
        the last record counts; not so one of an incarnation that had been superseded when it wrote it.
        """
        records: dict[int, BatchRecord] = {}
        newest = 0
        for item in read_lines(self.path):
            if item["epoch"] < newest:
                continue
            newest = item["epoch"]
            records[item["step"]] = BatchRecord(
                item["step"],
                item["epoch"],
                tuple(item["groups"]),
                tuple((key, use) for key, use in item["uses"]),
                tuple(item["late"]),
            )
        return [record for number, record in sorted(records.items()) if number > step]


def _pair(key: str) -> tuple[int, int]:
    group, _, index = key.partition(".")
    return int(group), int(index)
