"""One attempt at a task, from its first message to its last: turns, segments and spans.

Pure logic: it asks a `Generate` for tokens and a `Surroundings` for answers, tells a `Keeper` of finished turns, and
knows nothing of tickets, the broker or gRPC. A rollout is one segment: the prompt, then replies and what the
environment said, as tokens in their order.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from longshore.errors import ConfigError, LongshoreError, Rejected
from longshore.tasks.environment import Observation, Restoring
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
    """What generators drew. `spans` cover `token_ids`; their engine indices are into `engines`, most often one."""

    token_ids: list[int]
    spans: list[SampledSpan]
    finish: FinishReason
    engines: tuple[EngineFingerprint, ...]

    @property
    def is_sound(self) -> bool:
        """Whether it has tokens, all of them covered by spans."""
        return bool(self.token_ids) and sum(span.length for span in self.spans) == len(self.token_ids)


@dataclass(frozen=True)
class PlayedTurn:
    """A finished turn: the tokens given before the reply, the reply, and what the environment answered."""

    given: list[int]
    reply: Reply
    observation: Observation


@dataclass(frozen=True)
class Behind:
    """The part of an episode that is behind already, from its first message on."""

    opening: list[Message]
    turns: list[PlayedTurn]

    @property
    def num_sampled(self) -> int:
        return sum(len(turn.reply.token_ids) for turn in self.turns)


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

    @property
    def restoring(self) -> Restoring: ...

    async def start(self, task: Task) -> list[Message]: ...

    async def step(self, reply: str) -> Observation: ...

    async def snapshot(self) -> bytes: ...

    async def restore(self, task: Task, snapshot: bytes) -> None: ...


class Keeper(Protocol):
    """Told of what is behind, so that another actor can go on from there. Raises Fenced when one has."""

    def begin(self, opening: list[Message]) -> None: ...

    async def keep(self, turn: PlayedTurn, surroundings: Surroundings) -> None: ...


class KeepsNothing:
    """A keeper for rollouts that cost less than keeping them."""

    def begin(self, opening: list[Message]) -> None: ...

    async def keep(self, turn: PlayedTurn, surroundings: Surroundings) -> None: ...


@dataclass
class Transcript:
    """A rollout as it grows, as tokens and as text."""

    token_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    engines: list[EngineFingerprint] = field(default_factory=list)
    conversation: list[Message] = field(default_factory=list)
    finish: FinishReason = FinishReason.ABORTED

    def add(self, turn: PlayedTurn, text: str) -> None:
        """Adds a finished turn, whose reply reads `text`. Raises Rejected when the environment's info cannot travel."""
        reply = turn.reply
        if turn.given:
            self.token_ids.extend(turn.given)
            self.spans.append(GivenSpan(len(turn.given)))
        self.engines.extend(engine for engine in reply.engines if engine not in self.engines)
        places = [self.engines.index(engine) for engine in reply.engines]
        info = _checked_info(turn.observation.info)
        self.turns.append(Turn(SEGMENT_ID, len(self.token_ids), len(reply.token_ids), reply.finish, info))
        self.token_ids.extend(reply.token_ids)
        self.spans.extend(replace(span, engine_index=places[span.engine_index]) for span in reply.spans)
        self.conversation.append(Message("assistant", text))
        self.conversation.extend(turn.observation.messages)

    @property
    def segment(self) -> Segment:
        return Segment(SEGMENT_ID, tuple(self.token_ids), tuple(self.spans))

    def score_request(self, task: Task) -> ScoreRequest:
        """What a verifier is asked."""
        infos = [turn.info for turn in self.turns]
        reply = next(message.content for message in reversed(self.conversation) if message.role == "assistant")
        return ScoreRequest(task, list(self.conversation), reply, infos if any(infos) else [])


async def play(
    task: Task,
    sampling: Sampling,
    max_turns: int,
    renderer: Renderer,
    surroundings: Surroundings,
    generate: Generate,
    keeper: Keeper | None = None,
    behind: Behind | None = None,
) -> Transcript:
    """Plays a task to its end.

    Args:
        behind: what has been played already; the surroundings must be in the state after it.

    Raises:
        Rejected: the task cannot be attempted, or the environment answered with what cannot travel.
        AttemptFailed, Unavailable: the environment or the generator failed.
        Fenced: the keeper says that the attempt is no longer ours.
    """
    keeper = keeper or KeepsNothing()
    if behind is None:
        behind = Behind(await surroundings.start(task), [])
        keeper.begin(behind.opening)
    transcript = Transcript(conversation=list(behind.opening))
    for turn in behind.turns:
        transcript.add(turn, renderer.text(turn.reply.token_ids))
    last = behind.turns[-1] if behind.turns else None
    while (finish := finish_of(last, len(transcript.turns), max_turns)) is None:
        given = _given(renderer, transcript.conversation, last)
        reply = await _reply(transcript.token_ids + given, sampling, len(transcript.turns), generate)
        if reply is None:
            finish = FinishReason.LENGTH
            break
        text = renderer.text(reply.token_ids)
        last = PlayedTurn(given, reply, await surroundings.step(text))
        transcript.add(last, text)
        await keeper.keep(last, surroundings)
    transcript.finish = finish
    return transcript


def finish_of(last: PlayedTurn | None, turns: int, max_turns: int) -> FinishReason | None:
    """Why an episode is over after its last turn; None: it goes on."""
    if last is None:
        return None
    if last.observation.done or not last.observation.messages:
        return last.reply.finish if max_turns == 1 else FinishReason.ENVIRONMENT
    return FinishReason.TURNS if turns >= max_turns else None


def _given(renderer: Renderer, conversation: Sequence[Message], last: PlayedTurn | None) -> list[int]:
    """The tokens that the model is given before its next reply."""
    messages = list(conversation)
    with _readable():
        if last is not None:
            new = last.observation.messages
            return renderer.turn_ids(messages[: -len(new)], new, last.reply.token_ids[-1])
        given = renderer.prompt_ids(messages)
    if not given:
        raise Rejected("prompt", "the task's prompt has no tokens")
    return given


async def _reply(token_ids: list[int], sampling: Sampling, turn: int, generate: Generate) -> Reply | None:
    """The model's reply; None when a conversation that went well so far has outgrown the context."""
    try:
        reply = await generate(token_ids, sampling, turn)
    except Rejected as error:
        if turn > 0 and error.reason == "prompt":
            return None
        raise
    if not reply.is_sound:
        raise AttemptFailed("generator_failed", "the reply is empty or its spans do not cover it")
    return reply


def _checked_info(info: dict[str, object]) -> dict[str, object]:
    try:
        size = len(json.dumps(info, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise Rejected("environment", f"the environment's info is not JSON: {error}") from None
    if size > MAX_TURN_INFO_CHARACTERS:
        raise Rejected("environment", f"the environment's info has {size} characters for a turn")
    return info


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turns a tokenizer's refusal of a conversation into the task's rejection."""
    try:
        yield
    except ConfigError as error:
        raise Rejected("prompt", str(error)) from None
