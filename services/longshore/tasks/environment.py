"""What an environment is: whatever answers the model between its replies.

An environment holds the state of one rollout and never sees tokens. It runs inside the actor; what it says becomes
given tokens, which carry no loss.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

from longshore.types import Message, Task

# Every finished turn of a rollout is kept with one of these.
MAX_SNAPSHOT_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Observation:
    """What an environment answered to one reply.

    Example: Observation([Message("user", "higher")], done=False, info={"guess": 12})
    """

    messages: list[Message]
    done: bool
    # JSON-compatible, at most 64 KiB; the verifier gets one of these a turn. A text under "state" names the state that
    # the environment is in now: the advantage `gigpo` compares turns that were taken in the same state.
    info: dict[str, object] = field(default_factory=dict)


class Environment(Protocol):
    """One rollout's surroundings. Calls come one at a time; an exception ends the attempt.

    A class may have `check_options(options) -> list[str]`, a classmethod that names what is wrong with a job's
    `environment.options` before the job starts.

    When an actor dies, another goes on with its rollouts at the last finished turn, if their environment's class
    declares one of these; else it starts them anew:

    - `snapshot(self) -> bytes` gives the state after a step, at most MAX_SNAPSHOT_BYTES, in a format of its own;
      `restore(self, task, snapshot)` is called on a new instance in place of `start`.
    - `deterministic = True`: what `start` and `step` return depends on the options, the task and the replies alone,
      and they change nothing outside the instance. The steps are then repeated with the replies that were kept; an
      answer that differs from the one that was kept starts the rollout anew.
    """

    def __init__(self, options: dict[str, object]) -> None: ...

    def start(self, task: Task) -> list[Message]:
        """The conversation that the model first sees."""
        ...

    def step(self, reply: str) -> Observation:
        """Takes the model's reply. With `done` or no messages, the rollout ends."""
        ...


class Restoring(enum.Enum):
    """How an environment's rollouts can be gone on with after the death of their actor."""

    NONE = "none"
    SNAPSHOT = "snapshot"
    REPLAY = "replay"


def restoring(kind: type[Any]) -> Restoring:
    """What an environment's class declares; a snapshot is preferred, for it spares the steps."""
    if callable(getattr(kind, "snapshot", None)) and callable(getattr(kind, "restore", None)):
        return Restoring.SNAPSHOT
    return Restoring.REPLAY if getattr(kind, "deterministic", False) is True else Restoring.NONE


def declaration_fault(kind: type[Any]) -> str | None:
    """What is wrong with how a class says that its rollouts can be gone on with; None: nothing."""
    has = [name for name in ("snapshot", "restore") if callable(getattr(kind, name, None))]
    if len(has) == 1:
        return f"has {has[0]} without {'restore' if has[0] == 'snapshot' else 'snapshot'}"
    if not isinstance(getattr(kind, "deterministic", False), bool):
        return "`deterministic` must be True or False"
    return None


class SingleTurn:
    """One prompt, one reply: there is nothing to go on with."""

    def __init__(self, options: dict[str, object]) -> None:
        del options

    @classmethod
    def check_options(cls, options: dict[str, object]) -> list[str]:
        """It has none."""
        return [f"single-turn takes no options, got {', '.join(sorted(options))}"] if options else []

    def start(self, task: Task) -> list[Message]:
        return list(task.messages)

    def step(self, reply: str) -> Observation:
        return Observation([], done=True)
