"""A reply in the making: which tokens belong to it, what is said of them, and when it ends."""

from __future__ import annotations

from typing import Any

import pytest

from longshore.generator.engine import TokensDrawn
from longshore.generator.openai_http.answers import spans
from longshore.generator.openai_http.draft import Draft, Piece
from longshore.generator.openai_http.tool_calls import CallFinder, NoCalls, TaggedCalls
from longshore.types import FinishReason, KvMark

# A character's code is its token; this one is not shown.
END = 0


def draft(*stops: str, finder: CallFinder | None = None) -> Draft:
    def decode(token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))

    return Draft(decode, frozenset({END}), stops, finder or NoCalls())


def drawn(text: str, finish: FinishReason | None = None, **more: Any) -> TokensDrawn:
    tokens = tuple(map(ord, text)) + (END,) * (finish is FinishReason.STOP)
    made = {"version": 1, "kv": KvMark.RECOMPUTED, **more}
    return TokensDrawn("r", tokens, tuple(-0.01 * token for token in tokens), finish=finish, **made)


def test_a_stop_string_cuts_tokens_logprobs_and_text() -> None:
    made = draft("<e>")
    first, second = made.take(drawn("ab<")), made.take(drawn("e>cdef"))
    assert (first.text, first.finish, second.text, second.finish, made.ended) == ("ab", None, "", "stop", True)
    # The tokens up to the one that completes it, and no other.
    assert (first.token_ids, second.token_ids) == (tuple(map(ord, "ab<")), tuple(map(ord, "e>")))
    assert len(second.logprobs) == 2


def test_what_only_began_as_a_stop_string_is_said_in_the_end() -> None:
    made = draft("<e>")
    assert [made.take(drawn("ab<")).text, made.take(drawn("e", FinishReason.LENGTH)).text] == ["ab", "<e"]


def test_a_stop_string_is_found_in_the_last_tokens_too() -> None:
    for finish in (FinishReason.STOP, FinishReason.LENGTH):
        made = draft("<e>")
        piece = made.take(drawn("ab<e>", finish))
        assert (piece.text, piece.finish, made.ended) == ("ab", "stop", True)


@pytest.mark.parametrize(("finish", "word"), [(FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length")])
def test_the_engines_end_is_the_replys(finish: FinishReason, word: str) -> None:
    made = draft()
    assert made.take(drawn("ab")).finish is None
    last = made.take(drawn("c", finish))
    assert (last.text, last.finish, made.ended) == ("c", word, True)
    # The token that ended it is told, and not said.
    assert last.token_ids == ((ord("c"), END) if finish is FinishReason.STOP else (ord("c"),))


def test_a_stop_token_that_could_be_shown_is_not() -> None:
    made = draft()
    event = TokensDrawn("r", (ord("a"), ord("b")), (-0.1, -0.2), 1, KvMark.RECOMPUTED, finish=FinishReason.STOP)
    assert made.take(event).text == "a"


def test_calls_are_why_a_reply_ended_unless_it_was_cut_off() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for finish, word in ((FinishReason.STOP, "tool_calls"), (FinishReason.LENGTH, "length")):
        made = draft(finder=TaggedCalls())
        first, last = made.take(drawn(call)), made.take(drawn("x", finish))
        assert ([found.name for found in first.calls], last.calls, last.finish) == (["f"], (), word)


def pieces(*made: tuple[str, int, KvMark, int | None]) -> list[Piece]:
    maker = draft()
    return [maker.take(drawn(text, version=version, kv=kv, kv_min_version=low)) for text, version, kv, low in made]


def test_spans_say_which_version_drew_which_tokens() -> None:
    drew = pieces(
        ("ab", 3, KvMark.RECOMPUTED, None),
        ("c", 3, KvMark.RECOMPUTED, None),
        ("d", 4, KvMark.CARRIED, 3),
        ("", 5, KvMark.CARRIED, 3),
        ("ef", 5, KvMark.CARRIED, 3),
    )
    told = [tuple(span.values()) for span in spans(drew, start=10)]
    assert told == [(10, 3, 3, "recomputed", None), (13, 1, 4, "carried", 3), (14, 2, 5, "carried", 3)]
