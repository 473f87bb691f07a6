"""Chat templates: a tokenizer's Jinja text, rendered in a sandbox.

The same dialect as the transformers library's, without importing it: that would bring torch into every actor.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from longshore.errors import ConfigError
from longshore.types import Message

# What a template raises of itself, and what Python does when a message is not as it expects.
_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote; for rendering it is its body alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders conversations as a model was taught to read them.

    Raises:
        ConfigError: the text is not a template.
    """

    def __init__(self, text: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            autoescape=False,
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self.text = text
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(text)
            # Whether it says anything of tools that it is given.
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(text))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template is malformed: {error}") from None

    def render(self, messages: list[Message], *, generation_prompt: bool) -> str:
        """The conversation as text, with the start of a reply when `generation_prompt`.

        Raises:
            ConfigError: the template refuses these messages.
        """
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        return self.render_conversation(conversation, None, generation_prompt=generation_prompt)

    def render_conversation(
        self,
        conversation: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        *,
        generation_prompt: bool,
    ) -> str:
        """As `render`, for messages with more than role and content, and with tools to tell the model of.

        Raises:
            ConfigError: the template refuses these messages or tools.
        """
        try:
            return self._template.render(
                messages=conversation,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        except _REFUSALS as error:
            raise ConfigError(f"the tokenizer's chat template refuses the conversation: {error}") from None


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which templates do not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> Callable[[], None]:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
