"""Messages to tokens and back, with the tokenizer that came beside the weights.

Text is turned into tokens when it is given to the model, and never again: `turn_ids` makes tokens of what is new and
leaves the past as it was sampled (law 1). Needs `tokenizer.json`; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from longshore.errors import ConfigError
from longshore.tasks.templates import ChatTemplate
from longshore.types import Message

_CACHED_PROMPTS = 1024


class Renderer:
    """A tokenizer and its chat template.

    Args:
        source: a checkpoint directory, or its files as name -> content.

    Raises:
        ConfigError: there is no tokenizer.json, or a file is malformed.
    """

    def __init__(self, source: Path | dict[str, bytes]) -> None:
        assets = _read(source) if isinstance(source, Path) else source
        if "tokenizer.json" not in assets:
            raise ConfigError("the model has no tokenizer.json; save its tokenizer again with a recent transformers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # noqa: BLE001 - the Rust library raises bare Exception
            raise ConfigError(f"tokenizer.json is malformed: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = {name: _json(assets, name) for name in ("tokenizer_config.json", "generation_config.json")}
        special = _special_tokens(config["tokenizer_config.json"])
        text = _template_text(assets, config["tokenizer_config.json"])
        self._template = None if text is None else ChatTemplate(text, special)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int | None = (
            self._tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
        )
        # Tokens that say how a text is built, and are not part of it.
        self.special_ids = frozenset(
            token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self.stop_token_ids = _stop_ids(self.eos_token_id, config["generation_config.json"])
        self._cache: dict[tuple[Message, ...], list[int]] = {}

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Tokens of a conversation that the model is to answer.

        Raises:
            ConfigError: the template refuses it, or there is no template and it is not one user message.
        """
        key = tuple(messages)
        # A group's rollouts share their prompt.
        if key not in self._cache:
            if len(self._cache) >= _CACHED_PROMPTS:
                self._cache.clear()
            self._cache[key] = self._prompt_ids(messages)
        return list(self._cache[key])

    def _prompt_ids(self, messages: list[Message]) -> list[int]:
        if self._template is not None:
            return self._encode(self._template.render(messages, generation_prompt=True))
        if len(messages) != 1 or messages[0].role != "user":
            raise ConfigError("the model's tokenizer has no chat template, so a task must be one user message")
        ids: list[int] = self._tokenizer.encode(messages[0].content, add_special_tokens=True).ids
        return ids

    def conversation_ids(
        self, conversation: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """As `prompt_ids`, for messages with more than role and content (tool calls and their results), and tools.

        Raises:
            ConfigError: the template refuses them, or there is none and it is not one user message.
        """
        if self._template is not None:
            return self._encode(self._template.render_conversation(conversation, tools, generation_prompt=True))
        return self._prompt_ids([Message(str(item["role"]), str(item["content"])) for item in conversation])

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text that is to be gone on with, after those that begin every text of this tokenizer."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    @property
    def template_text(self) -> str | None:
        """The chat template, if there is one."""
        return None if self._template is None else self._template.text

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return self._template is not None and self._template.takes_tools

    def token_id(self, token: str) -> int | None:
        """The id of one token of the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def turn_ids(self, before: list[Message], new: list[Message], last_token: int | None = None) -> list[int]:
        """Tokens that `new` messages add after the model's reply, up to the start of its next one.

        Args:
            before: the conversation so far; the last message is the reply.
            new: what the environment answered.
            last_token: the reply's last token; when it is what the template ends a reply with, it is not repeated.

        Raises:
            ConfigError: the template refuses the conversation.
        """
        if self._template is None:
            return self._encode("".join(message.content for message in new))
        # A stand-in for the reply: templates rewrite old replies (they drop reasoning), and the past must not matter.
        mark = uuid.uuid4().hex
        marked = [*before[:-1], Message("assistant", mark), *new]
        _, found, tail = self._template.render(marked, generation_prompt=True).partition(mark)
        if not found:
            raise ConfigError("the tokenizer's chat template leaves out replies, so it cannot hold several turns")
        ids = self._encode(tail)
        return ids[1:] if ids and ids[0] == last_token else ids

    def reply_ids(self, text: str) -> list[int]:
        """Tokens of a reply written by hand, for demonstrations: the text and the end-of-sequence token."""
        return self._encode(text) + ([self.eos_token_id] if self.eos_token_id is not None else [])

    def text(self, token_ids: list[int]) -> str:
        """What was said, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def full_text(self, token_ids: list[int]) -> str:
        """What was said, special tokens and all. Bytes that are no character are shown as U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _read(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _json(assets: dict[str, bytes], name: str) -> dict[str, object]:
    try:
        value = json.loads(assets.get(name, b"{}"))
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object")
    return value


def _special_tokens(config: dict[str, object]) -> dict[str, str]:
    found = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found


def _template_text(assets: dict[str, bytes], config: dict[str, object]) -> str | None:
    if "chat_template.jinja" in assets:
        return assets["chat_template.jinja"].decode("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _stop_ids(eos: int | None, generation: dict[str, object]) -> tuple[int, ...]:
    listed = generation.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({token for token in (eos, *ids) if isinstance(token, int)}))
