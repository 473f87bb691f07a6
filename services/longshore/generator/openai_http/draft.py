"""One reply in the making: the engine's events in, what an answer says of them out. Pure logic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from longshore.generator.engine import TokensDrawn
from longshore.generator.openai_http.reply_text import GrowingText, StopStrings
from longshore.generator.openai_http.tool_calls import CallFinder, Found, FoundCall
from longshore.types import FinishReason, KvMark


@dataclass(frozen=True)
class Piece:
    """What one event adds to a reply."""

    text: str
    calls: tuple[FoundCall, ...]
    token_ids: tuple[int, ...]
    # [len(token_ids)] natural-log probabilities of the distribution that each was drawn from.
    logprobs: tuple[float, ...]
    version: int
    kv: KvMark
    kv_min_version: int | None
    # OpenAI's word; None while the reply goes on.
    finish: str | None


class Draft:
    """Takes a reply's events in order; `ended` once nothing more is wanted of the engine."""

    def __init__(
        self, decode: Callable[[list[int]], str], hidden: frozenset[int], stops: tuple[str, ...], finder: CallFinder
    ) -> None:
        self._text = GrowingText(decode, hidden)
        self._stops = StopStrings(stops) if stops else None
        self._finder = finder
        self._has_called = False
        self.ended = False

    def take(self, event: TokensDrawn) -> Piece:
        """The piece of one event; of tokens behind a stop string nothing is told."""
        assert not self.ended
        taken, text = self._take_tokens(event)
        is_cut = self._stops is not None and self._stops.found
        self.ended = is_cut or event.finish is not None
        if self.ended and not is_cut:
            text += self._last_text()
        found = self._finder.add(text)
        if self.ended:
            rest = self._finder.end()
            found = Found(found.text + rest.text, found.calls + rest.calls)
        self._has_called = self._has_called or bool(found.calls)
        return Piece(
            text=found.text,
            calls=found.calls,
            token_ids=event.token_ids[:taken],
            logprobs=event.logprobs[:taken],
            version=event.version,
            kv=event.kv,
            kv_min_version=event.kv_min_version,
            finish=self._finish(event, is_cut) if self.ended else None,
        )

    def _take_tokens(self, event: TokensDrawn) -> tuple[int, str]:
        """How many of an event's tokens belong to the reply, and the text that they add."""
        # The token that ends a reply is the engine's word for its end, not part of what is said.
        said = event.token_ids[:-1] if event.finish is FinishReason.STOP else event.token_ids
        if self._stops is None:
            return len(event.token_ids), self._text.add(said)
        text = ""
        for number, token in enumerate(said, 1):
            text += self._stops.add(self._text.add([token]))
            if self._stops.found:
                return number, text
        return len(event.token_ids), text

    def _last_text(self) -> str:
        """What was held back for a rest that does not come."""
        rest = self._text.end()
        return rest if self._stops is None else self._stops.add(rest) + self._stops.end()

    def _finish(self, event: TokensDrawn, is_cut: bool) -> str:
        if not is_cut and event.finish is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if self._has_called else "stop"


@dataclass
class Told:
    """How much of a reply has been told already."""

    pieces: int = 0
    tokens: int = 0
    calls: int = 0

    def add(self, piece: Piece) -> None:
        self.pieces += 1
        self.tokens += len(piece.token_ids)
        self.calls += len(piece.calls)


@dataclass
class Reply:
    """All pieces of one reply."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def calls(self) -> list[FoundCall]:
        return [call for piece in self.pieces for call in piece.calls]

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.pieces)
