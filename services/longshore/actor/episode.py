"""One attempt at a task, from its first message to its last: turns, segments and spans.

Pure logic: it asks a `Generate` for tokens and a `Surroundings` for answers, and knows nothing of tickets, the broker
or gRPC. A rollout is one segment: the prompt, then replies and what the environment said, as tokens in their order.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from longshore.errors import ConfigError, LongshoreError, Rejected
from longshore.tasks.environment import Observation
from longshore.tasks.rendering import Renderer
from longshore.tasks.verification import ScoreRequest
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    Message,
    SampledSpan,
    Sampling,
    Segment,
    Span,
    Task,
    Turn,
    Verdict,
)

SEGMENT_ID = "0"
MAX_TURN_INFO_CHARACTERS = 64 * 1024


class AttemptFailed(LongshoreError):
    """This attempt is over; another one may go better. `reason` is a short stable word."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Reply:
    """What a generator drew. `spans` cover `token_ids`; their table indices are filled in by the episode."""

    token_ids: list[int]
    spans: list[SampledSpan]
    finish: FinishReason
    engine: EngineFingerprint


class Generate(Protocol):
    """Draws one reply.

    Raises:
        Rejected: no generator can answer this prompt.
        AttemptFailed, Unavailable: none could within the caller's patience.
    """

    async def __call__(self, token_ids: list[int], sampling: Sampling, turn: int) -> Reply: ...


class Verify(Protocol):
    """Scores a finished rollout; None: the verdict comes later.

    Raises:
        Rejected: it cannot be scored.
        Unavailable: no verifier could within the caller's patience.
    """

    async def __call__(self, request: ScoreRequest) -> Verdict | None: ...


class Surroundings(Protocol):
    """An environment that does not hold up the others while it thinks."""

    async def start(self, task: Task) -> list[Message]: ...

    async def step(self, reply: str) -> Observation: ...


@dataclass
class Transcript:
    """A rollout as it grows, as tokens and as text."""

    token_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    engines: list[EngineFingerprint] = field(default_factory=list)
    conversation: list[Message] = field(default_factory=list)
    finish: FinishReason = FinishReason.ABORTED

    def give(self, token_ids: list[int]) -> None:
        """Adds given tokens; none add no span."""
        if token_ids:
            self.token_ids.extend(token_ids)
            self.spans.append(GivenSpan(len(token_ids)))

    def add_reply(self, reply: Reply, text: str) -> None:
        """Adds a reply as sampled spans and as a message."""
        if reply.engine not in self.engines:
            self.engines.append(reply.engine)
        engine_index = self.engines.index(reply.engine)
        self.turns.append(Turn(SEGMENT_ID, len(self.token_ids), len(reply.token_ids), reply.finish))
        self.token_ids.extend(reply.token_ids)
        self.spans.extend(replace(span, engine_index=engine_index) for span in reply.spans)
        self.conversation.append(Message("assistant", text))

    def observe(self, info: dict[str, object]) -> None:
        """Notes what the environment said of the newest turn. Raises Rejected when that cannot travel."""
        try:
            size = len(json.dumps(info, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise Rejected("environment", f"the environment's info is not JSON: {error}") from None
        if size > MAX_TURN_INFO_CHARACTERS:
            raise Rejected("environment", f"the environment's info has {size} characters for a turn")
        self.turns[-1] = replace(self.turns[-1], info=info)

    @property
    def segment(self) -> Segment:
        return Segment(SEGMENT_ID, tuple(self.token_ids), tuple(self.spans))

    def score_request(self, task: Task) -> ScoreRequest:
        """What a verifier is asked."""
        infos = [turn.info for turn in self.turns]
        reply = next(message.content for message in reversed(self.conversation) if message.role == "assistant")
        return ScoreRequest(task, list(self.conversation), reply, infos if any(infos) else [])


async def play(
    task: Task, sampling: Sampling, max_turns: int, renderer: Renderer, surroundings: Surroundings, generate: Generate
) -> Transcript:
    """Plays a task to its end.

    Raises:
        Rejected: the task cannot be attempted, or the environment answered with what cannot travel.
        AttemptFailed, Unavailable: the environment or the generator failed.
    """
    transcript = Transcript(conversation=await surroundings.start(task))
    with _readable():
        given = renderer.prompt_ids(transcript.conversation)
    if not given:
        raise Rejected("prompt", "the task's prompt has no tokens")
    for turn in range(max_turns):
        reply = await _reply(transcript.token_ids + given, sampling, turn, generate)
        if reply is None:
            transcript.finish = FinishReason.LENGTH
            return transcript
        transcript.give(given)
        text = renderer.text(reply.token_ids)
        transcript.add_reply(reply, text)
        observation = await surroundings.step(text)
        transcript.observe(observation.info)
        before = list(transcript.conversation)
        transcript.conversation.extend(observation.messages)
        if observation.done or not observation.messages:
            transcript.finish = reply.finish if max_turns == 1 else FinishReason.ENVIRONMENT
            return transcript
        with _readable():
            given = renderer.turn_ids(before, observation.messages, reply.token_ids[-1])
    transcript.finish = FinishReason.TURNS
    return transcript


async def _reply(token_ids: list[int], sampling: Sampling, turn: int, generate: Generate) -> Reply | None:
    """The model's reply; None when a conversation that went well so far has outgrown the context."""
    try:
        reply = await generate(token_ids, sampling, turn)
    except Rejected as error:
        if turn > 0 and error.reason == "prompt":
            return None
        raise
    if not reply.token_ids or sum(span.length for span in reply.spans) != len(reply.token_ids):
        raise AttemptFailed("generator_failed", "the reply is empty or its spans do not cover it")
    return reply


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turns a tokenizer's refusal of a conversation into the task's rejection."""
    try:
        yield
    except ConfigError as error:
        raise Rejected("prompt", str(error)) from None
