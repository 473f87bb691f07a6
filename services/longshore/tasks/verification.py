"""What a verifier is: whatever gives a finished rollout its reward."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

from longshore.types import Message, Task, Verdict

# A pattern sees at most this much of a reply, from its end: where answers are.
MAX_EXTRACT_CHARACTERS = 32_768


@dataclass(frozen=True)
class ScoreRequest:
    """A finished rollout, as text.

    Example: ScoreRequest(task, conversation=[*task.messages, Message("assistant", "nus")], reply="nus")
    """

    task: Task
    # Every message, the model's replies included.
    conversation: list[Message]
    # The model's last reply.
    reply: str
    # What the environment said of each turn, in order; empty for single-turn tasks.
    turn_info: list[dict[str, object]] = field(default_factory=list)


class Verifier(Protocol):
    """Scores rollouts, in a process of its own that is ended when it takes too long. Constructed once a process.

    A class may also have two classmethods, asked before a job starts: `check_options(options) -> list[str]` names what
    is wrong with `verifier.options`; `check_task(task) -> str | None` says what a task lacks to be scored.
    """

    version: str

    def __init__(self, options: dict[str, object]) -> None: ...

    def score(self, request: ScoreRequest) -> Verdict:
        """The verdict. Its `verifier` field is filled in by the service. An exception is a failure, not a 0."""
        ...


def check_pattern(options: dict[str, object]) -> list[str]:
    """What is wrong with the option `extract`: a regular expression with one group."""
    pattern = options.get("extract")
    if pattern is None:
        return []
    if not isinstance(pattern, str):
        return ["extract must be a regular expression in a string"]
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"extract is not a regular expression: {error}"]
    return [] if groups == 1 else [f"extract must have exactly one group, this has {groups}"]


def extracted(reply: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a reply: the group's last match, or the whole reply without a pattern; None: no match."""
    if pattern is None:
        return reply.strip()
    answer = None
    for match in pattern.finditer(reply[-MAX_EXTRACT_CHARACTERS:]):
        answer = match.group(1)
    return None if answer is None else answer.strip()
