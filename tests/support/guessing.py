"""Guessing games, as environments that can and cannot be gone on with. Also installed as a plug-in package by tests."""

from __future__ import annotations

import json
import os
import signal

from longshore.tasks.environment import Observation
from longshore.types import Message, Task


class Forgetful:
    """Says "higher" or "lower" and counts; nobody can bring it back."""

    def __init__(self, options: dict[str, object]) -> None:
        self._rounds = 0

    def start(self, task: Task) -> list[Message]:
        self._target = int(task.answer or "0")
        return list(task.messages)

    def step(self, reply: str) -> Observation:
        self._rounds += 1
        guess = int(reply)
        info: dict[str, object] = {"guess": guess, "round": self._rounds}
        if guess == self._target:
            return Observation([], done=True, info=info)
        hint = "higher" if guess < self._target else "lower"
        return Observation([Message("user", f"{self._rounds}:{hint}")], done=False, info=info)


class Replayed(Forgetful):
    """The same guesses get the same answers."""

    deterministic = True


class Restored(Forgetful):
    """Gives its state away, and takes it back."""

    def snapshot(self) -> bytes:
        return json.dumps([self._target, self._rounds]).encode()

    def restore(self, task: Task, snapshot: bytes) -> None:
        assert task.answer is not None
        self._target, self._rounds = json.loads(snapshot)


class Deadly(Replayed):
    """Takes its actor with it at a guess of 66."""

    def step(self, reply: str) -> Observation:
        if int(reply) == 66:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(reply)
