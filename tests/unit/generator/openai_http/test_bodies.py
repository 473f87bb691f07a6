"""Which fields are taken, which are refused and by what name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longshore.generator.openai_http.bodies import ChatBody, CompletionBody, parse
from longshore.generator.openai_http.faults import ApiError

NO_PROMPTS: list[Any] = [
    *(None, 5, [], [1, "a"], [True], [1.5], [1, True], {"a": 1}, ["a"] * 129, [[1, None]]),
]
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({**CHAT, **fields}).encode())


def refused(**fields: Any) -> dict[str, Any]:
    """The error of a chat with these fields."""
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    error: dict[str, Any] = caught.value.body["error"]
    return error


@pytest.mark.parametrize(
    ("field", "same", "others"),
    [
        ("top_p", [1, 1.0], [0.9, True, "1", [1]]),
        ("top_k", [-1, 0], [5, False, 0.5]),
        ("frequency_penalty", [0, 0.0], [0.1, False]),
        ("logit_bias", [{}], [{"5": 1}, [], False]),
        ("response_format", [{"type": "text"}], [{"type": "json_object"}, {"type": "text", "x": 1}, "text"]),
        ("parallel_tool_calls", [True], [False, 1]),
        ("echo", [False], [True, 0]),
        ("store", [False], [True]),
    ],
)
def test_only_what_changes_nothing_is_taken(field: str, same: list[Any], others: list[Any]) -> None:
    for value in [*same, None]:
        chat(**{field: value})
    for value in others:
        error = refused(**{field: value})
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")
        assert field in error["message"]


def test_what_is_not_known_is_not_ignored() -> None:
    assert refused(temprature=0.5)["code"] == "unknown_parameter"
    assert "'temprature'" in refused(temprature=0.5)["message"]
    assert len(refused(**{"x" * 100_000: 1})["message"]) < 1000


def test_the_wrong_field_is_named_by_its_path() -> None:
    wrong = [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    assert refused(messages=wrong)["param"] == "messages.1.content"
    assert refused(messages=[{"role": "user", "contents": "x"}])["param"] == "messages.0.contents"
    assert refused(longshore={"min_version": -1})["param"] == "longshore.min_version"
    assert refused(longshore={"max_version": 2**63})["param"] == "longshore.max_version"
    assert refused(tools=[{"type": "function", "function": {"name": "a b"}}])["param"] == "tools.0.function.name"
    assert refused(model=5)["param"] == "model"
    with pytest.raises(ApiError) as caught:
        parse(CompletionBody, b'{"model": "m"}')
    assert caught.value.body["error"]["code"] == "missing_required_parameter"


def test_messages_reach_the_template_as_it_expects_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}, "index": 0}
    odd = {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "a=1"}}
    body = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, odd], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "1"},
        ]
    )
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "a=1"}},
            ],
        },
        {"role": "tool", "content": "1", "name": "add", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        ([[]], [[]]),
    ],
)
def test_prompts_have_four_shapes(prompt: object, prompts: list[object]) -> None:
    assert parse(CompletionBody, json.dumps({"model": "m", "prompt": prompt}).encode()).prompts == prompts


@pytest.mark.parametrize("prompt", NO_PROMPTS)
def test_prompts_have_no_other(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionBody, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert caught.value.body["error"]["param"] == "prompt"


def test_stops_are_a_string_or_some() -> None:
    assert (chat().stops, chat(stop="x").stops, chat(stop=["x", "y"]).stops) == ((), ("x",), ("x", "y"))
    for wrong in ("", [""], ["x"] * 9, "x" * 129, 5, [5], {"x": 1}):
        assert refused(stop=wrong)["param"] == "stop"


def test_tools_that_may_not_be_called_are_not_offered() -> None:
    tool = {"type": "function", "function": {"name": "add", "strict": True}}
    assert [found.function.name for found in chat(tools=[tool]).offered] == ["add"]
    assert chat(tools=[tool], tool_choice="none").offered == []
    assert [warning.split(" ")[0] for warning in chat(tools=[tool], seed=1).warnings] == [
        *("seed", "tools.function.strict")
    ]
    assert chat(tools=[tool], tool_choice="none").warnings == []
    for choice in ("required", {"type": "function", "function": {"name": "add"}}, 5):
        assert refused(tools=[tool], tool_choice=choice)["param"] == "tool_choice"
