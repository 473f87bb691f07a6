"""One task's tickets in the learner's books, and how a ticket ends. Plain values; the ledger moves them.

A group is *open* from issue until it is trained on (or accounted). Tickets whose verdict is awaited at that moment stay
with it: it is *late* then, with the statistics of the members that were trained, until the last of them has ended.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from longshore.learner.credit.group import Baseline
from longshore.types import Message, Purpose, Rollout, Task

# Fewer scored members say nothing about which attempt was better.
MIN_MEMBERS = 2


@dataclass(frozen=True)
class Ending:
    """How one ticket ended."""

    key: str
    outcome: str
    # Its rollout's place in the broker's stream; None: it has none.
    entry_id: str | None
    # Who made the rollout; "home" for a ticket without one.
    site: str = "home"
    # Of the serialised rollout.
    num_bytes: int = 0
    # The broker ended it by itself and told us: its counts know already.
    noticed: bool = False


@dataclass(frozen=True)
class Origin:
    """Where something that came home lies in the broker's stream, who made it, and how large it is."""

    entry_id: str
    site: str = "home"
    num_bytes: int = 0


@dataclass
class Group:
    """The tickets of one task, and what has come home of them. Dictionaries are by ticket index."""

    group_id: int
    purpose: Purpose
    task: Task
    size: int
    # The one policy version that may answer; None: any.
    pin: int | None = None
    # Scored, and not yet trained on.
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    # Serialised rollouts that await their verdict: kept as bytes, which take a tenth of the room.
    awaiting: dict[int, bytes] = field(default_factory=dict)
    # Scored, but not part of the batch that this group was taken for.
    held_back: dict[int, Rollout] = field(default_factory=dict)
    # Ended without a rollout.
    final_reasons: dict[int, str] = field(default_factory=dict)
    # How the tickets ended that have ended.
    ended: dict[int, str] = field(default_factory=dict)
    entry_ids: dict[int, str] = field(default_factory=dict)
    sites: dict[int, str] = field(default_factory=dict)
    num_bytes: dict[int, int] = field(default_factory=dict)
    # Of the members that were trained on; None while the group is open.
    baseline: Baseline | None = None
    # Whether it waits in line for a batch, or was taken for one.
    in_line: bool = False
    # Whether a train step is made of it right now: who joins it from here on is late.
    taken: bool = False

    @property
    def missing(self) -> list[int]:
        """Indices of the tickets that are still out."""
        return [index for index in range(self.size) if self.is_missing(index)]

    def is_missing(self, index: int) -> bool:
        """Whether nothing is known of a ticket but that it is out."""
        return not any(index in part for part in self._known)

    @property
    def _known(self) -> tuple[Collection[int], ...]:
        # No index is in two of them.
        return (self.rollouts, self.awaiting, self.held_back, self.final_reasons, self.ended)

    @property
    def live(self) -> list[int]:
        """Indices of the tickets that have not ended: the broker has to know them."""
        return [index for index in range(self.size) if index not in self.final_reasons and index not in self.ended]

    @property
    def closed(self) -> bool:
        """All its tickets are terminal or await their verdict (law 6)."""
        return sum(map(len, self._known)) == self.size

    @property
    def trainable(self) -> bool:
        """Closed, with members to compare; or with all that it will ever have."""
        return self.closed and bool(self.rollouts) and (len(self.rollouts) >= MIN_MEMBERS or not self.awaiting)

    @property
    def parked(self) -> bool:
        """Closed, but there is nothing to train on before verdicts have come: it takes no place in admission."""
        return self.baseline is None and bool(self.awaiting) and self.closed and not self.trainable

    @property
    def members(self) -> list[tuple[int, Rollout]]:
        """Rollouts by index: the order must not depend on who arrived first, or a replay would differ."""
        return sorted(self.rollouts.items())

    def join(self, index: int, rollout: Rollout) -> None:
        """Takes a scored member in."""
        (self.held_back if self.taken else self.rollouts)[index] = rollout

    def hold_back_all_but(self, indices: set[int]) -> None:
        """Leaves only these members to be trained on now; the others count as late."""
        for index in [index for index in self.rollouts if index not in indices]:
            self.held_back[index] = self.rollouts.pop(index)

    def ending(self, index: int, outcome: str) -> Ending:
        """Notes that a ticket has ended, and returns it as the broker is told."""
        noticed = index in self.final_reasons
        for part in (self.rollouts, self.awaiting, self.held_back, self.final_reasons):
            part.pop(index, None)
        self.ended[index] = outcome
        key, site = f"{self.group_id}.{index}", self.sites.get(index, "home")
        return Ending(key, outcome, self.entry_ids.get(index), site, self.num_bytes.get(index, 0), noticed)

    def state(self) -> dict[str, object]:
        """JSON-compatible. Rollouts are left out: the broker holds them until they are acknowledged."""
        task = self.task
        return {
            "group_id": self.group_id,
            "purpose": self.purpose.value,
            "size": self.size,
            "pin": self.pin,
            "baseline": None if self.baseline is None else list(self.baseline.rewards),
            "ended": list(self.ended.items()),
            "task": {
                "task_id": task.task_id,
                "messages": [[message.role, message.content] for message in task.messages],
                "answer": task.answer,
                "info": task.info,
                "environment": task.environment,
                "num_example_messages": task.num_example_messages,
            },
        }

    @staticmethod
    def restore(state: dict[str, object]) -> Group:
        """The group that `state` was taken of, without the rollouts that had come home."""
        task, baseline = as_mapping(state["task"]), state["baseline"]
        pin = state["pin"]
        return Group(
            group_id=as_int(state["group_id"]),
            purpose=Purpose(state["purpose"]),
            size=as_int(state["size"]),
            pin=None if pin is None else as_int(pin),
            task=Task(
                task_id=str(task["task_id"]),
                messages=tuple(Message(*[str(part) for part in as_list(pair)]) for pair in as_list(task["messages"])),
                answer=None if task["answer"] is None else str(task["answer"]),
                info=as_mapping(task["info"]),
                environment=str(task["environment"]),
                # Checkpoints that are older than examples have none.
                num_example_messages=as_int(task.get("num_example_messages", 0)),
            ),
            ended={as_int(index): str(outcome) for index, outcome in map(as_list, as_list(state["ended"]))},
            baseline=None if baseline is None else Baseline(tuple(as_float(number) for number in as_list(baseline))),
        )


@dataclass(frozen=True)
class LateMember:
    """A rollout whose verdict came after its group had been trained on."""

    group_id: int
    index: int
    rollout: Rollout
    baseline: Baseline
    site: str = "home"

    @property
    def key(self) -> str:
        return f"{self.group_id}.{self.index}"


def as_int(value: object) -> int:
    """What a checkpoint must hold here; so with the others."""
    assert isinstance(value, int)
    return value


def as_float(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)


def as_list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def as_mapping(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value
