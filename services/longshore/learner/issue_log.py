"""The issue record: which groups were issued, durable before their first ticket is sent.

After a crash the ledger opens the groups again that the checkpoint does not know of, with the same numbers and the
same tasks: what an earlier incarnation issued is out, whatever the checkpoint says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from longshore.learner.durable_lines import append_line, read_lines
from longshore.types import Purpose


@dataclass(frozen=True)
class IssueRecord:
    """Some groups that were issued together.

    Example: IssueRecord(epoch=2, first_group=48, groups=16, size=8, purpose="train")
    """

    epoch: int
    first_group: int
    groups: int
    # Tickets a group.
    size: int
    purpose: str
    # The one version that may answer; None: any.
    pin: int | None = None
    # Serialised tasks (hex) of dead letters that are attempted again; empty: the tasks are the next of the source.
    tasks: tuple[str, ...] = ()
    # The newest wish for another attempt that this record fulfils.
    wish: str = ""
    # Of an evaluation: before, step or after, and the train steps that its version has behind it.
    when: str = ""
    step: int = 0
    # Positions in the source of the tasks that a curriculum chose; empty: nothing was chosen.
    positions: tuple[int, ...] = ()

    @property
    def kind(self) -> Purpose:
        return Purpose(self.purpose)


class IssueLog:
    """The records of one job, in a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: IssueRecord) -> None:
        """Returns when the record is on disk."""
        append_line(self.path, asdict(record))

    def after(self, next_group: int) -> list[IssueRecord]:
        """The records of the groups from `next_group` on, in order.

        Where groups were recorded twice (an incarnation that had been superseded wrote its last), the newer epoch's
        record counts, and what the older one recorded from there on does not.
        """
        records: list[IssueRecord] = []
        for item in read_lines(self.path):
            lists = {"tasks": tuple(item["tasks"]), "positions": tuple(item.get("positions", ()))}
            record = IssueRecord(**{**item, **lists})
            if records and record.epoch < records[-1].epoch:
                continue
            while records and records[-1].first_group >= record.first_group:
                records.pop()
            records.append(record)
        return [record for record in records if record.first_group >= next_group]
