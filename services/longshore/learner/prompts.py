"""The prompt that a task becomes, as whoever issues its tickets knows it: rollouts leave it out on their way home."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longshore.errors import ConfigError
from longshore.rpc.token_columns import prompt_digest
from longshore.types import Message, Task


class Prompts:
    """Prompts of one job's tasks. `render` turns a conversation into token ids, or raises ConfigError."""

    def __init__(self, render: Callable[[list[Message]], Sequence[int]]) -> None:
        self._render = render

    def ids(self, task: Task) -> Sequence[int] | None:
        """Token ids of a task's prompt; None where it cannot be rendered: then no rollout may leave it out."""
        try:
            return self._render(list(task.messages))
        except ConfigError:
            return None

    def digest(self, task: Task) -> bytes:
        """What a ticket names the prompt by; empty where there is none."""
        ids = self.ids(task)
        return prompt_digest(ids) if ids else b""
