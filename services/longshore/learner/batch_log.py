"""The batch record (law 5): what each train step was made of, durable before the step is taken.

One JSON line a step, synced to disk. After a crash the steps beyond the checkpoint are replayed from here.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BatchRecord:
    """Example: BatchRecord(step=7, epoch=1, groups=(12, 9), uses=(("12.0", 1), ("12.1", 1), ("9.0", 1)))"""

    step: int
    epoch: int
    # In the order in which they were put together.
    groups: tuple[int, ...]
    # (rollout_id, use) of every rollout in the batch, in order.
    uses: tuple[tuple[str, int], ...]


class BatchLog:
    """The records of one job, in a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: BatchRecord) -> None:
        """Returns when the record is on disk."""
        line = json.dumps(
            {"step": record.step, "epoch": record.epoch, "groups": record.groups, "uses": record.uses},
            separators=(",", ":"),
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def after(self, step: int) -> list[BatchRecord]:
        """Records of the steps beyond `step`, in order. A last line that a crash tore is dropped from the file.

        Where a step was recorded twice (a record was written, its step never taken, and the job went on otherwise),
        the last record counts.
        """
        if not self.path.exists():
            return []
        records: dict[int, BatchRecord] = {}
        good = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                good += len(line)
                item = json.loads(line)
                records[item["step"]] = BatchRecord(
                    item["step"],
                    item["epoch"],
                    tuple(item["groups"]),
                    tuple((key, use) for key, use in item["uses"]),
                )
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)
        return [record for number, record in sorted(records.items()) if number > step]
