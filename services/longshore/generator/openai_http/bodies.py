"""Requests as OpenAI's clients write them, checked field by field. Knows nothing of tokens.

What would change the distribution that tokens are drawn from is refused, unless it has the value that changes nothing:
the log-probs that come with each token must be those of the distribution that it was drawn from (law 2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field

from longshore.errors import Fault
from longshore.generator.openai_http.faults import ApiError, bad

# Replies to one request: n, times the prompts of a list.
MAX_REPLIES = 128
_MAX_MESSAGES = 8192
_MAX_TOOLS = 128
_MAX_STOPS, _MAX_STOP_CHARACTERS = 8, 128
_MAX_STOP_IDS = 64
_MAX_TOKENS = 2**31 - 1
_MAX_VERSION = 2**63 - 1

_DISTRIBUTION = "would change the distribution that the log-probs speak of"
_CONSTRAINED = "needs constrained decoding, which would change the distribution that the log-probs speak of"
_ELSEWHERE = "is not something that a policy in training has"
# field -> (values that change nothing, why others are refused). null always changes nothing.
_ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "top_p": ((1, 1.0), _DISTRIBUTION),
    "top_k": ((-1, 0), _DISTRIBUTION),
    "min_p": ((0, 0.0), _DISTRIBUTION),
    "typical_p": ((1, 1.0), _DISTRIBUTION),
    "frequency_penalty": ((0, 0.0), _DISTRIBUTION),
    "presence_penalty": ((0, 0.0), _DISTRIBUTION),
    "repetition_penalty": ((1, 1.0), _DISTRIBUTION),
    "logit_bias": (({},), _DISTRIBUTION),
    "response_format": (({"type": "text"},), _CONSTRAINED),
    "best_of": ((1,), "picks among replies; ask for n and pick yourself"),
    "echo": ((False,), "would need the prompt's log-probs; the prompt's token ids come with return_token_ids"),
    "suffix": (("",), "needs a model that fills in the middle"),
    "parallel_tool_calls": ((True,), _CONSTRAINED),
    "functions": (([],), "was replaced by tools"),
    "function_call": (("auto", "none"), "was replaced by tool_choice"),
    "modalities": ((["text"],), _ELSEWHERE),
    "audio": ((), _ELSEWHERE),
    "prediction": ((), _ELSEWHERE),
    "web_search_options": ((), _ELSEWHERE),
    "moderation": ((), _ELSEWHERE),
    "reasoning_effort": ((), "is not something that the engine can set; say it in the prompt"),
    "verbosity": ((), "is not something that the engine can set; say it in the prompt"),
    "store": ((False,), "is not possible: nothing is kept here"),
    "service_tier": (("auto", "default"), _ELSEWHERE),
}
# What tells OpenAI who asks and how to cache; it changes no answer.
_IDLE = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
IGNORED_SEED = "seed is ignored: requests are decoded together, from one stream of random numbers"
IGNORED_STRICT = "tools.function.strict is ignored: it needs constrained decoding, which changes the distribution"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Strict):
    """What a stream has besides chunks of replies."""

    include_usage: bool | None = None
    # Padding against guesses by length, which plain chunks do not have.
    include_obfuscation: bool | None = None


class VersionBounds(_Strict):
    """Longshore's own: inclusive bounds of the policy versions that may answer."""

    min_version: Annotated[int, Field(ge=0, le=_MAX_VERSION)] | None = None
    max_version: Annotated[int, Field(ge=0, le=_MAX_VERSION)] | None = None


class Body(_Strict):
    """What both kinds of requests have."""

    model: str = Field(min_length=1, max_length=512)
    n: Annotated[int, Field(ge=1, le=MAX_REPLIES)] | None = None
    temperature: pydantic.FiniteFloat | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    stop: Any = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MAX_STOP_IDS)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    longshore: VersionBounds | None = None

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, value: object) -> object:
        stops = value if isinstance(value, list) else [] if value is None else [value]
        if len(stops) > _MAX_STOPS:
            raise ValueError(f"at most {_MAX_STOPS} stop strings")
        if not all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"must be a string, or a list of them, each of 1 to {_MAX_STOP_CHARACTERS} characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop) if isinstance(self.stop, list) else (self.stop,) if self.stop else ()

    @property
    def warnings(self) -> list[str]:
        """What was asked for and is not done, and why."""
        return [] if self.seed is None else [IGNORED_SEED]


class CalledFunction(_Strict):
    """What an earlier reply called."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """One call of an earlier reply."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    # What streamed deltas have, and some clients send back.
    index: int | None = None


class ChatMessage(_Strict):
    """One message. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What answers carry as null or empty, and clients send back.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @pydantic.field_validator("content")
    @classmethod
    def _check_content(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("must be text, or a list of text parts")
        for part in value:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError('every part must be {"type": "text", "text": ...}: this model reads text alone')
        return value

    @property
    def text(self) -> str:
        """The content as one text; empty where there is none."""
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, object]:
        """As chat templates expect it: arguments of calls are values, not JSON."""
        found: dict[str, object] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        if self.name is not None:
            found["name"] = self.name
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return found


class Function(_Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, object]:
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Any = None

    @pydantic.field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None) -> int | None:
        return _no_others(value)

    @pydantic.field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, value: object) -> object:
        if value not in (None, "auto", "none"):
            raise ValueError(f'must be "auto" or "none": to force a call {_CONSTRAINED}')
        return value

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def warnings(self) -> list[str]:
        strict = any(tool.function.strict for tool in self.offered)
        return super().warnings + [IGNORED_STRICT] * strict


class CompletionBody(Body):
    """POST /v1/completions"""

    # A text, token ids, or a list of either.
    prompt: Any
    logprobs: int | None = None

    @pydantic.field_validator("logprobs")
    @classmethod
    def _check_logprobs(cls, value: int | None) -> int | None:
        return _no_others(value)

    @pydantic.field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: object) -> object:
        prompts = _prompts(value)
        if not 1 <= len(prompts) <= MAX_REPLIES:
            raise ValueError(f"must hold 1 to {MAX_REPLIES} prompts, got {len(prompts)}")
        if not all(isinstance(prompt, str) or _are_ids(prompt) for prompt in prompts):
            raise ValueError("must be a text, a list of token ids, or a list of texts or of lists of token ids")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        return _prompts(self.prompt)


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], text: bytes) -> AnyBody:
    """A request's body. Raises ApiError 400 that names the field which is wrong."""
    try:
        # UTF-8, depth, half characters and not-a-number are its parser's to refuse.
        document = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise bad(None, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise bad(None, "the body must be a JSON object")
    known = kind.model_fields
    _check_others({name: value for name, value in document.items() if name not in known})
    try:
        return kind.model_validate({name: value for name, value in document.items() if name in known})
    except pydantic.ValidationError as error:
        raise _first(error) from None


def _check_others(others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if name in _IDLE or value is None:
            continue
        if name not in _ONLY:
            raise bad(name[:200], f"{name[:200]!r} is no field that this server knows", "unknown_parameter")
        allowed, reason = _ONLY[name]
        # True equals 1, and is none.
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in allowed):
            raise bad(name, str(Fault(name, value, f"{reason}, so it is refused")), "unsupported_parameter")


def _first(error: pydantic.ValidationError) -> ApiError:
    entry = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in entry["loc"])[:200]
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "missing":
        return bad(path, f"{path}: is missing", "missing_required_parameter")
    return bad(path, str(Fault(path, entry["input"], message)), "invalid_value")


def _no_others(value: int | None) -> int | None:
    """Of how many other tokens the log-probs are asked for."""
    if value:
        raise ValueError("must be 0: the engine tells the log-prob of the token that it drew, not those of others")
    return value


def _prompts(value: object) -> list[Any]:
    """A prompt's alternatives brought to one shape; what they are of is not checked yet."""
    if isinstance(value, list) and not (value and type(value[0]) is int):
        return value
    return [value]


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _arguments(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
