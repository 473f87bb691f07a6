"""Calls of tools in a reply's text, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.generator.openai_http.tool_calls import (
    CallFinder,
    FoundCall,
    TaggedCalls,
    WholeReplyCalls,
    finder,
)

ADD = FoundCall("add", '{"a": 1}')
TAGGED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
WHOLE = '{"name": "add", "parameters": {"a": 1}}'


def found(made: CallFinder, pieces: list[str]) -> tuple[str, list[FoundCall]]:
    parts = [*(made.add(piece) for piece in pieces), made.end()]
    return "".join(part.text for part in parts), [call for part in parts for call in part.calls]


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


PLACES = st.lists(st.integers(0, 1000), max_size=20)


@given(PLACES)
def test_tagged_calls_are_found_with_text_around(places: list[int]) -> None:
    text = f"Let me see < that. {TAGGED} and {TAGGED} done <tool"
    assert found(TaggedCalls(), cut(text, places)) == ("Let me see < that.  and  done <tool", [ADD, ADD])


@given(PLACES)
def test_a_whole_reply_may_be_calls(places: list[int]) -> None:
    for text in (WHOLE, f"  {WHOLE}", f"<|python_tag|>{WHOLE}"):
        assert found(WholeReplyCalls(), cut(text, places)) == ("", [ADD])
    assert found(WholeReplyCalls(), cut(f"{WHOLE}; {WHOLE}", places)) == ("", [ADD, ADD])


@given(st.text(), PLACES)
def test_a_reply_without_calls_is_its_text(text: str, places: list[int]) -> None:
    for made in (TaggedCalls(), WholeReplyCalls()):
        said, calls = found(made, cut(text, places))
        assert (said, calls) == (text, [])


@pytest.mark.parametrize(
    "inside",
    [
        *("", "add(1)", "[]", '{"name": 5, "arguments": {}}', '{"name": "", "arguments": {}}', '{"arguments": {}}'),
        *('{"name": "add", "arguments": [1]}', '{"name": "add", "arguments": "one"}', "[" * 100_000),
        '{"name": "add", "arguments": {"a": NaN}}',
    ],
)
@given(PLACES)
def test_what_cannot_be_read_stays_text(inside: str, places: list[int]) -> None:
    text = f"a <tool_call>{inside}</tool_call> b"
    assert found(TaggedCalls(), cut(text, places)) == (text, [])


def test_text_is_told_as_soon_as_it_is_certain() -> None:
    made = TaggedCalls()
    assert [made.add(piece).text for piece in ("so <", "b> it", " is <tool_c")] == ["so ", "<b> it", " is "]
    whole = WholeReplyCalls()
    assert [whole.add(piece).text for piece in (" ", "So", " {")] == ["", " So", " {"]


def test_a_call_is_told_when_it_is_closed() -> None:
    made = TaggedCalls()
    assert made.add(TAGGED + TAGGED[:-3]).calls == (ADD,)
    assert made.add(TAGGED[-3:]).calls == (ADD,)


def test_a_turn_may_end_in_place_of_the_closing_tag() -> None:
    assert found(TaggedCalls(), [TAGGED.removesuffix("</tool_call>")]) == ("", [ADD])
    half = '<tool_call>{"name": "add", "argu'
    assert found(TaggedCalls(), [half]) == (half, [])


def test_arguments_may_be_json_within_json() -> None:
    text = json.dumps({"name": "add", "arguments": '{"a": 1}'})
    assert found(TaggedCalls(), [f"<tool_call>{text}</tool_call>"]) == ("", [ADD])


@pytest.mark.parametrize("text", [f"{WHOLE} and", f"{WHOLE}, {WHOLE}", '{"a": 1}', f"{WHOLE}; no", "{"])
def test_a_reply_that_is_more_than_calls_is_text(text: str) -> None:
    assert found(WholeReplyCalls(), [text]) == (text, [])


def test_templates_are_told_apart() -> None:
    assert isinstance(finder("... <tool_call> ..."), TaggedCalls)
    assert isinstance(finder("... <|python_tag|> ..."), WholeReplyCalls)
    assert finder("{{ tools }}") is None
