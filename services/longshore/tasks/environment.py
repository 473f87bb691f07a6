"""What an environment is: whatever answers the model between its replies.

An environment holds the state of one rollout and never sees tokens. It runs inside the actor; what it says becomes
given tokens, which carry no loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from longshore.types import Message, Task


@dataclass(frozen=True)
class Observation:
    """What an environment answered to one reply.

    Example: Observation([Message("user", "higher")], done=False, info={"guess": 12})
    """

    messages: list[Message]
    done: bool
    # JSON-compatible, at most 64 KiB; the verifier gets one of these a turn.
    info: dict[str, object] = field(default_factory=dict)


class Environment(Protocol):
    """One rollout's surroundings. Calls come one at a time; an exception ends the attempt.

    A class may have `check_options(options) -> list[str]`, a classmethod that names what is wrong with a job's
    `environment.options` before the job starts.
    """

    def __init__(self, options: dict[str, object]) -> None: ...

    def start(self, task: Task) -> list[Message]:
        """The conversation that the model first sees."""
        ...

    def step(self, reply: str) -> Observation:
        """Takes the model's reply. With `done` or no messages, the rollout ends."""
        ...


class SingleTurn:
    """One prompt, one reply."""

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
