"""What is known in memory of a group that is kept for replay; its rollouts are on the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longshore.learner.groups import as_float, as_int, as_list, as_mapping


@dataclass(frozen=True)
class Entry:
    """One group that was trained on.

    Example: Entry(12, "sum-7", members=(0, 1, 3), uses=1, file="group-12-1.bin", sha256="9f..", num_bytes=2048,
        min_version=40, admitted=41, success=0.67, magnitude=0.47)
    """

    group_id: int
    task_id: str
    # Indices of the tickets whose rollouts were trained on together, ascending.
    members: tuple[int, ...]
    # How often they were trained on.
    uses: int
    file: str
    # Of the file's bytes.
    sha256: str
    num_bytes: int
    # Of the oldest token.
    min_version: int
    # The train step of the first use.
    admitted: int
    # Mean reward of the members, held within 0 and 1.
    success: float
    # Population standard deviation of their rewards: the root mean square of their plain advantages.
    magnitude: float

    @property
    def keys(self) -> list[str]:
        """Rollout ids, in order."""
        return [f"{self.group_id}.{index}" for index in self.members]

    def age(self, version: int) -> int:
        """Versions published since the oldest token."""
        return max(0, version - self.min_version)

    def used(self) -> Entry:
        """The same after one more training."""
        return replace(self, uses=self.uses + 1)

    def state(self) -> dict[str, object]:
        """JSON-compatible."""
        return {**vars(self), "members": list(self.members)}

    @staticmethod
    def restore(state: object) -> Entry:
        """The entry that `state` was taken of."""
        item = as_mapping(state)
        return Entry(
            group_id=as_int(item["group_id"]),
            task_id=str(item["task_id"]),
            members=tuple(as_int(index) for index in as_list(item["members"])),
            uses=as_int(item["uses"]),
            file=str(item["file"]),
            sha256=str(item["sha256"]),
            num_bytes=as_int(item["num_bytes"]),
            min_version=as_int(item["min_version"]),
            admitted=as_int(item["admitted"]),
            success=as_float(item["success"]),
            magnitude=as_float(item["magnitude"]),
        )
