"""A multi-turn environment: after a wrong number it says which way to go, until the answer or the last turn."""

from __future__ import annotations

from longshore.tasks.environment import Observation
from longshore.types import Message, Task


class HigherLower:
    """One rollout's game. `environment.max_turns` of the job limits the number of guesses."""

    # The same guesses get the same hints: a game whose actor died is played again up to where it was.
    deterministic = True

    def __init__(self, options: dict[str, object]) -> None:
        del options

    @classmethod
    def check_options(cls, options: dict[str, object]) -> list[str]:
        """Optional: what is wrong with `environment.options`, said before the job starts."""
        return ["higher-lower takes no options"] if options else []

    def start(self, task: Task) -> list[Message]:
        self._target = int(task.answer or "0")
        return list(task.messages)

    def step(self, reply: str) -> Observation:
        # A turn's info reaches the verifier; JSON only.
        guess = parse_guess(reply)
        info: dict[str, object] = {"guess": guess}
        if guess == self._target:
            return Observation([], done=True, info=info)
        hint = "number?" if guess is None else "higher" if guess < self._target else "lower"
        return Observation([Message("user", f" {hint}:")], done=False, info=info)


def parse_guess(reply: str) -> int | None:
    """The number that a reply is, or None."""
    text = reply.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else None
