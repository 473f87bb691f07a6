"""What a request asks of the engine: its body's fields as token ids, sampling parameters and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longshore.errors import ConfigError, Fault
from longshore.generator.engine import MAX_TEMPERATURE, MIN_TEMPERATURE, EngineLimits
from longshore.generator.openai_http import tool_calls
from longshore.generator.openai_http.bodies import MAX_REPLIES, Body, ChatBody, CompletionBody
from longshore.generator.openai_http.faults import bad
from longshore.tasks.rendering import Renderer
from longshore.types import Sampling, VersionConstraint

# What OpenAI draws for a text when nothing is said; a chat's reply may fill the context.
_DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Asked:
    """One request, understood. Replies are numbered prompt by prompt: the n of the first come first."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    # Replies to each prompt.
    n: int
    # One for each prompt: how much fits differs.
    samplings: tuple[Sampling, ...]
    stops: tuple[str, ...]
    # Makes what finds the tool calls of one reply.
    finder: Callable[[], tool_calls.CallFinder]
    version: VersionConstraint
    stream: bool
    include_usage: bool
    logprobs: bool
    return_token_ids: bool
    warnings: tuple[str, ...]

    @property
    def num_replies(self) -> int:
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def is_watched(self) -> bool:
        """Whether tokens are wanted as they come: to be shown, or to end the reply at the right one."""
        return self.stream or bool(self.stops)


def chat(body: ChatBody, pinned: int | None, renderer: Renderer, limits: EngineLimits) -> Asked:
    """A chat request; renders its messages, which takes time. Raises ApiError 400."""
    finder: Callable[[], tool_calls.CallFinder] = tool_calls.NoCalls
    tools = None
    if body.offered:
        finder = _finder(renderer)
        tools = [tool.for_template() for tool in body.offered]
    try:
        prompt = renderer.conversation_ids([message.for_template() for message in body.messages], tools)
    except ConfigError as error:
        raise bad("messages", f"messages: {error}") from None
    longest = body.max_completion_tokens or body.max_tokens or limits.context
    return _asked(body, pinned, renderer, limits, (tuple(prompt),), longest, finder, bool(body.logprobs), "messages")


def completion(body: CompletionBody, pinned: int | None, renderer: Renderer, limits: EngineLimits) -> Asked:
    """A text request; tokenises its prompts, which takes time. Raises ApiError 400."""
    prompts = tuple(tuple(renderer.text_ids(prompt) if isinstance(prompt, str) else prompt) for prompt in body.prompts)
    longest = body.max_tokens or _DEFAULT_COMPLETION_TOKENS
    return _asked(
        body, pinned, renderer, limits, prompts, longest, tool_calls.NoCalls, body.logprobs is not None, "prompt"
    )


def _asked(
    body: Body,
    pinned: int | None,
    renderer: Renderer,
    limits: EngineLimits,
    prompts: tuple[tuple[int, ...], ...],
    longest: int,
    finder: Callable[[], tool_calls.CallFinder],
    logprobs: bool,
    param: str,
) -> Asked:
    for prompt in prompts:
        _check_prompt(prompt, limits, param)
    n = body.n or 1
    if n * len(prompts) > MAX_REPLIES:
        raise bad("n", f"n: {n} replies to {len(prompts)} prompts are more than {MAX_REPLIES}")
    stop_ids = (*renderer.stop_token_ids, *_stop_ids(body, limits))
    temperature = _temperature(body.temperature)
    return Asked(
        model=body.model,
        prompts=prompts,
        n=n,
        samplings=tuple(
            Sampling(temperature, min(longest, limits.context - len(prompt)), stop_ids) for prompt in prompts
        ),
        stops=body.stops,
        finder=finder,
        version=_version(body, pinned),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        logprobs=logprobs,
        return_token_ids=bool(body.return_token_ids),
        warnings=tuple(body.warnings),
    )


def _check_prompt(prompt: tuple[int, ...], limits: EngineLimits, param: str) -> None:
    if not prompt:
        raise bad(param, f"{param}: must not be empty")
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        raise bad(param, f"{param}: token ids must lie in 0..{limits.vocab_size - 1}")
    if len(prompt) + 1 > limits.context:
        message = f"{param}: {len(prompt)} tokens leave no room for a reply in a context of {limits.context}"
        raise bad(param, message, "context_length_exceeded")


def _temperature(value: float | None) -> float:
    if value is None:
        return 1.0
    # As near to always the likeliest token as log-probs can be told of.
    if value == 0.0:
        return MIN_TEMPERATURE
    if not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise bad(
            "temperature",
            str(Fault("temperature", value, f"must be 0 or lie in {MIN_TEMPERATURE}..{MAX_TEMPERATURE}")),
            "invalid_value",
        )
    return value


def _stop_ids(body: Body, limits: EngineLimits) -> list[int]:
    stop_ids = body.stop_token_ids or []
    if any(token >= limits.vocab_size for token in stop_ids):
        raise bad("stop_token_ids", f"stop_token_ids: token ids must lie in 0..{limits.vocab_size - 1}")
    return stop_ids


def _version(body: Body, pinned: int | None) -> VersionConstraint:
    bounds = body.longshore
    low, high = (None, None) if bounds is None else (bounds.min_version, bounds.max_version)
    if pinned is not None:
        if (low is not None and low > pinned) or (high is not None and high < pinned):
            raise bad("longshore", f"longshore: its bounds exclude version {pinned}, which the model's name pins")
        return VersionConstraint(pinned, pinned)
    if low is not None and high is not None and low > high:
        raise bad("longshore", f"longshore: min_version {low} is above max_version {high}")
    return VersionConstraint(low, high)


def _finder(renderer: Renderer) -> Callable[[], tool_calls.CallFinder]:
    if not renderer.takes_tools:
        raise bad("tools", "tools: the model's chat template tells it of no tools", "unsupported_parameter")
    template = renderer.template_text or ""
    if tool_calls.finder(template) is None:
        message = "tools: the model's chat template has it write calls in a way that is not known here"
        raise bad("tools", message, "unsupported_parameter")

    def make() -> tool_calls.CallFinder:
        found = tool_calls.finder(template)
        assert found is not None
        return found

    return make
