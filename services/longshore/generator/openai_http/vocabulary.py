"""A job's tokens as text: what the interface needs of the tokenizer that came with the weights."""

from __future__ import annotations

import functools

from longshore.generator.openai_http.tool_calls import MARKS
from longshore.tasks.rendering import Renderer


class Vocabulary:
    """Shows tokens; those that say where a tool's call is are shown even where the tokenizer calls them special."""

    def __init__(self, assets: dict[str, bytes]) -> None:
        """Raises ConfigError: there is no tokenizer.json, or a file is malformed."""
        self.renderer = Renderer(assets)
        self.hidden = self.renderer.special_ids - {self.renderer.token_id(mark) for mark in MARKS}
        # One token's text is asked for again and again.
        self.token_text = functools.lru_cache(maxsize=65536)(self._token_text)

    def text(self, token_ids: list[int]) -> str:
        """The text of token ids, each of which is shown."""
        return self.renderer.full_text(token_ids)

    def _token_text(self, token: int) -> str:
        return self.renderer.full_text([token])
