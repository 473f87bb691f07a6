"""Whatever is sent: an answer, or an error that is the sender's; never one of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_site import TOOL_CHATML
from scripted_engine import KEY, ScriptedServer

CHAT: dict[str, Any] = {"model": "scripted", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"model": "scripted", "max_tokens": 3, "prompt": "x"}
FIELDS = (
    *("model", "messages", "prompt", "n", "temperature", "max_tokens", "max_completion_tokens", "stop", "seed"),
    *("stop_token_ids", "stream", "stream_options", "return_token_ids", "longshore", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "top_p", "logit_bias", "response_format", "echo", "user", "x", ""),
)
WORDS = st.sampled_from(
    ["role", "user", "assistant", "tool", "content", "type", "text", "function", "name", "parameters", "min_version"]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | WORDS
    | st.sampled_from([0, 1, -1, "x"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])},
        optional={"content": VALUES, "name": VALUES, "tool_calls": VALUES, "tool_call_id": VALUES},
    ),
    max_size=4,
)

Ask = Callable[[str, bytes], tuple[int, bytes]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Sends one body to a path, past the socket; answers with the status and all that came."""
    folder: Path = tmp_path_factory.mktemp("hostile")

    async def start() -> ScriptedServer:
        return ScriptedServer(folder, TOOL_CHATML, lambda prompt: "<tool_call>yes")

    async def answer(path: str, body: bytes) -> tuple[int, bytes]:
        incoming: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if not incoming:
                await asyncio.Event().wait()
            return incoming.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
        await server.app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    with asyncio.Runner() as runner:
        server = runner.run(start())
        yield lambda path, body: runner.run(answer(path, body))


def check(ask: Ask, path: str, body: bytes) -> None:
    status, text = ask(path, body)
    assert status < 500, text
    assert b"server_error" not in text
    if status == 200:
        return
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(text) < 4000


MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.binary(max_size=200))
@MANY
def test_bytes(ask: Ask, body: bytes) -> None:
    check(ask, "/v1/chat/completions", body)


@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=5), st.sampled_from([CHAT, TEXT])
)
@MANY
def test_fields_of_wrong_kinds(ask: Ask, fields: dict[str, Any], base: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if base is CHAT else "/v1/completions"
    check(ask, path, json.dumps({**base, **fields}).encode())


@given(MESSAGES, VALUES)
@MANY
def test_conversations(ask: Ask, messages: list[Any], tools: object) -> None:
    check(ask, "/v1/chat/completions", json.dumps({**CHAT, "messages": messages}).encode())
    check(ask, "/v1/chat/completions", json.dumps({**CHAT, "messages": messages, "tools": tools}).encode())


@given(VALUES)
@MANY
def test_schemas_of_tools(ask: Ask, schema: object) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    check(ask, "/v1/chat/completions", json.dumps({**CHAT, "tools": [tool]}).encode())


@given(st.text(max_size=60))
@MANY
def test_paths(ask: Ask, path: str) -> None:
    check(ask, "/v1/" + path, json.dumps(CHAT).encode())
