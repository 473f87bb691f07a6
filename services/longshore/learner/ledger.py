"""The learner's ledger: which tickets are out, what came home, and how each ended.

The authority on "issued = trained + accounted". Pure bookkeeping: knows no broker, no clock and no tensors; the
checkpoint carries `state()`, and `restore` brings back exactly what it held.

Groups are numbered in the order of issue and live here from issue until they are settled (trained or accounted).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from longshore.types import Message, Purpose, Rollout, Task

# Outcomes of this many settled groups are remembered, to answer repeated deliveries with what really happened. A
# broker that loses its tail loses seconds, not thousands of groups.
REMEMBERED_GROUPS = 4096
TRAINED = "trained"


@dataclass(frozen=True)
class Ending:
    """How one ticket ended. `entry_id` is its rollout's place in the broker's stream; None: it has none."""

    key: str
    outcome: str
    entry_id: str | None


@dataclass
class Group:
    """The tickets of one task, and what has come home of them."""

    group_id: int
    purpose: Purpose
    task: Task
    size: int
    # By ticket index.
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    final_reasons: dict[int, str] = field(default_factory=dict)
    entry_ids: dict[int, str] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        """All its tickets are terminal (law 6)."""
        return len(self.rollouts) + len(self.final_reasons) == self.size

    @property
    def missing(self) -> list[int]:
        """Indices of the tickets that are still out."""
        return [index for index in range(self.size) if index not in self.rollouts and index not in self.final_reasons]

    @property
    def members(self) -> list[tuple[int, Rollout]]:
        """Rollouts by index: the order must not depend on who arrived first, or a replay would differ."""
        return sorted(self.rollouts.items())


class Ledger:
    """All groups from issue to settlement, and the counts of everything that ended."""

    def __init__(self) -> None:
        self.next_group = 0
        self.issued = 0
        self.outcomes: Counter[str] = Counter()
        # Insertion order is the order of issue.
        self.open: dict[int, Group] = {}
        # Training groups in the order in which they closed: what the next batch is taken from.
        self._ready: deque[int] = deque()
        self._empty: list[int] = []
        self._settled: dict[int, dict[int, str]] = {}

    # -- issue -------------------------------------------------------------------------------------------------------

    def issue(self, task: Task, purpose: Purpose, size: int) -> Group:
        """Opens the next group."""
        group = Group(self.next_group, purpose, task, size)
        self.next_group += 1
        self.issued += size
        self.open[group.group_id] = group
        return group

    def open_groups(self, purpose: Purpose) -> list[Group]:
        return [group for group in self.open.values() if group.purpose is purpose]

    # -- what comes home ---------------------------------------------------------------------------------------------

    def receive(self, rollout: Rollout, entry_id: str) -> str | None:
        """Takes a rollout in. Returns None when it is new, or how its ticket had ended when it is a repeat."""
        return self._arrive(rollout.ref.group_id, rollout.ref.index, entry_id, rollout, None)

    def end_ticket(self, group_id: int, index: int, reason: str, entry_id: str) -> str | None:
        """Takes in that a ticket ended without a rollout. Returns as `receive` does."""
        return self._arrive(group_id, index, entry_id, None, reason)

    def _arrive(
        self, group_id: int, index: int, entry_id: str, rollout: Rollout | None, reason: str | None
    ) -> str | None:
        group = self.open.get(group_id)
        if group is None:
            return self._settled.get(group_id, {}).get(index, TRAINED)
        if index not in group.missing:
            # The same entry read twice, or one delivered again after the broker lost its tail: first delivery wins,
            # and the newest entry is the one to acknowledge.
            group.entry_ids[index] = entry_id
            return None
        group.entry_ids[index] = entry_id
        if rollout is not None:
            group.rollouts[index] = rollout
        else:
            assert reason is not None
            group.final_reasons[index] = reason
        if group.closed and group.purpose is Purpose.TRAIN:
            (self._ready if group.rollouts else self._empty).append(group_id)
        return None

    # -- what is taken out -------------------------------------------------------------------------------------------

    @property
    def num_ready(self) -> int:
        """Closed training groups that wait to be trained on."""
        return len(self._ready)

    def take_ready(self, count: int) -> list[Group]:
        """Takes the `count` groups that closed first. They stay open until settled."""
        return [self.open[self._ready.popleft()] for _ in range(count)]

    def take(self, group_ids: Sequence[int]) -> list[Group] | None:
        """Takes exactly these groups, in this order (a recorded batch); None while one has not closed."""
        if not all(group_id in self.open and self.open[group_id].closed for group_id in group_ids):
            return None
        for group_id in group_ids:
            self._ready.remove(group_id)
        return [self.open[group_id] for group_id in group_ids]

    def take_empty(self) -> list[Group]:
        """Takes the training groups that closed without a single rollout: there is nothing to train on."""
        empty, self._empty = self._empty, []
        return [self.open[group_id] for group_id in empty]

    def settle(self, group: Group, outcome: str) -> list[Ending]:
        """Ends a group: its rollouts with `outcome`, its other tickets with their own reasons."""
        ends = {index: group.final_reasons.get(index, outcome) for index in range(group.size)}
        self.outcomes.update(ends.values())
        del self.open[group.group_id]
        self._settled[group.group_id] = ends
        if len(self._settled) > REMEMBERED_GROUPS:
            self._settled.pop(next(iter(self._settled)))
        return [
            Ending(f"{group.group_id}.{index}", reason, group.entry_ids.get(index)) for index, reason in ends.items()
        ]

    def settle_all(self, outcome: str) -> list[Ending]:
        """Ends everything that is still open, for the end of a job."""
        self._ready.clear()
        self._empty.clear()
        return [ending for group in list(self.open.values()) for ending in self.settle(group, outcome)]

    # -- accounts ----------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> int:
        return self.outcomes[TRAINED]

    @property
    def accounted(self) -> dict[str, int]:
        """Final reasons other than trained, with their counts."""
        return {reason: count for reason, count in sorted(self.outcomes.items()) if reason != TRAINED and count}

    @property
    def balanced(self) -> bool:
        """The equation: issued = trained + accounted + still open."""
        return self.issued == self.outcomes.total() + sum(group.size for group in self.open.values())

    # -- checkpoint --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """JSON-compatible. Rollouts are left out: the broker holds them until they are acknowledged."""
        return {
            "next_group": self.next_group,
            "issued": self.issued,
            "outcomes": dict(self.outcomes),
            "open": [_group_state(group) for group in self.open.values()],
            "settled": [
                [group_id, [[index, outcome] for index, outcome in ends.items()]]
                for group_id, ends in self._settled.items()
            ],
        }

    @staticmethod
    def restore(state: dict[str, object]) -> Ledger:
        """The ledger that `state` was taken of, without the rollouts that had come home."""
        ledger = Ledger()
        ledger.next_group = _int(state["next_group"])
        ledger.issued = _int(state["issued"])
        ledger.outcomes = Counter({reason: _int(count) for reason, count in _mapping(state["outcomes"]).items()})
        for item in _list(state["open"]):
            group = _group_from_state(_mapping(item))
            ledger.open[group.group_id] = group
        for item in _list(state["settled"]):
            group_id, ends = _list(item)
            pairs = [_list(pair) for pair in _list(ends)]
            ledger._settled[_int(group_id)] = {_int(index): str(outcome) for index, outcome in pairs}
        return ledger


def tickets_of(groups: Iterable[Group]) -> list[tuple[Group, int]]:
    """(group, index) of every ticket that is still out, in the order of issue."""
    return [(group, index) for group in groups for index in group.missing]


def _group_state(group: Group) -> dict[str, object]:
    task = group.task
    return {
        "group_id": group.group_id,
        "purpose": group.purpose.value,
        "size": group.size,
        "task": {
            "task_id": task.task_id,
            "messages": [[message.role, message.content] for message in task.messages],
            "answer": task.answer,
            "info": task.info,
            "environment": task.environment,
        },
    }


def _group_from_state(state: dict[str, object]) -> Group:
    task = _mapping(state["task"])
    return Group(
        group_id=_int(state["group_id"]),
        purpose=Purpose(state["purpose"]),
        size=_int(state["size"]),
        task=Task(
            task_id=str(task["task_id"]),
            messages=tuple(Message(*[str(part) for part in _list(pair)]) for pair in _list(task["messages"])),
            answer=None if task["answer"] is None else str(task["answer"]),
            info=_mapping(task["info"]),
            environment=str(task["environment"]),
        ),
    )


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _mapping(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value
