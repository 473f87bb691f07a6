"""An agent that was written for OpenAI's client, with a tool: it runs against the interface unchanged.

The engine is scripted, because a model that fits into a test calls no tools; everything before it is real.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_site import TOOL_CHATML
from scripted_engine import KEY, ScriptedServer

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        "strict": True,
    },
}
LLAMA = TOOL_CHATML.replace("<tool_call>", "<|python_tag|>").replace("</tool_call>", "")


def script(prompt: str) -> str:
    """Calls until it has both sums, then says the last."""
    results = prompt.count("<|im_start|>tool\n")
    if results == 0:
        return (
            'I add. <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
            '<tool_call>{"name": "add", "arguments": {"a": 10, "b": 20}}</tool_call>'
        )
    if results == 2:
        return '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 30}}</tool_call>'
    last = prompt.rpartition("<|im_start|>tool\n")[2].partition("<|im_end|>")[0]
    return f"It is {last}."


def llama_script(prompt: str) -> str:
    if "<|im_start|>tool\n" not in prompt:
        return '{"name": "add", "parameters": {"a": 3, "b": 30}}'
    last = prompt.rpartition("<|im_start|>tool\n")[2].partition("<|im_end|>")[0]
    return f"It is {last}."


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer(tmp_path, TOOL_CHATML, script) as server:
        yield server


def client_of(server: ScriptedServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=20.0)


async def once(client: openai.AsyncOpenAI, messages: list[Any]) -> Any:
    answer = await client.chat.completions.create(model="scripted", messages=messages, tools=[ADD])
    choice = answer.choices[0]
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    return choice.message.model_dump()


async def streamed(client: openai.AsyncOpenAI, messages: list[Any]) -> Any:
    """As agents gather streamed messages."""
    stream = await client.chat.completions.create(model="scripted", messages=messages, tools=[ADD], stream=True)
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    finish = None
    async for chunk in stream:
        (choice,) = chunk.choices
        message["content"] += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.index == len(message["tool_calls"]):
                empty = {"id": call.id, "type": "function", "function": {"name": "", "arguments": ""}}
                message["tool_calls"].append(empty)
            function = message["tool_calls"][call.index]["function"]
            function["name"] += call.function.name or ""
            function["arguments"] += call.function.arguments or ""
        finish = choice.finish_reason or finish
    assert finish == ("tool_calls" if message["tool_calls"] else "stop")
    return message if message["tool_calls"] else {"role": "assistant", "content": message["content"]}


async def run_agent(server: ScriptedServer, ask: Any) -> tuple[str, list[str]]:
    """The last answer, and the names and arguments of all calls."""
    messages: list[Any] = [{"role": "user", "content": "1+2, 10+20, and both together?"}]
    called = []
    async with client_of(server) as client:
        for _ in range(5):
            message = await ask(client, messages)
            messages.append(message)
            if not message.get("tool_calls"):
                return message["content"], called
            for call in message["tool_calls"]:
                assert call["id"].startswith("call_")
                arguments = json.loads(call["function"]["arguments"])
                called.append(f"{call['function']['name']} {arguments['a']} {arguments['b']}")
                result = str(arguments["a"] + arguments["b"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    raise AssertionError("the agent did not come to an end")


@pytest.mark.parametrize("ask", [once, streamed])
async def test_an_agent_with_a_tool_comes_to_its_answer(server: ScriptedServer, ask: Any) -> None:
    assert await run_agent(server, ask) == ("It is 33.", ["add 1 2", "add 10 20", "add 3 30"])


@pytest.mark.parametrize("ask", [once, streamed])
async def test_so_it_does_with_a_model_that_calls_as_llama_does(tmp_path: Path, ask: Any) -> None:
    async with ScriptedServer(tmp_path, LLAMA, llama_script) as server:
        assert await run_agent(server, ask) == ("It is 33.", ["add 3 30"])


async def test_text_beside_calls_is_kept_and_tags_are_not(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        messages: list[Any] = [{"role": "user", "content": "?"}]
        message = await once(client, messages)
        assert message["content"] == "I add. "
        # Without tools nothing is looked for: the reply is its text.
        plain = await client.chat.completions.create(model="scripted", messages=messages)
        assert plain.choices[0].message.tool_calls is None
        assert (plain.choices[0].message.content or "").count("</tool_call>") == 2
        strict = await client.chat.completions.create(model="scripted", messages=messages, tools=[ADD])
        assert strict.model_extra is not None
        assert "strict is ignored" in strict.model_extra["warnings"][0]


async def test_the_clients_own_stream_helper_reads_it(server: ScriptedServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "?"}]
    tools = [{**ADD, "function": {**ADD["function"], "strict": False}}]
    async with (
        client_of(server) as client,
        client.chat.completions.stream(model="scripted", messages=messages, tools=tools) as stream,
    ):
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 1, "b": 2}, {"a": 10, "b": 20}]


async def test_a_template_without_tools_says_so(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    odd = "{{ tools }}" + template
    for text, fault in ((template, "tells it of no tools"), (odd, "in a way that is not known here")):
        async with ScriptedServer(tmp_path, text, script) as server, client_of(server) as client:
            with pytest.raises(openai.BadRequestError, match=fault) as caught:
                await client.chat.completions.create(
                    model="scripted", messages=[{"role": "user", "content": "?"}], tools=[ADD]
                )
            assert caught.value.param == "tools"


async def test_a_conversation_that_the_template_refuses_is_the_callers_fault(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    async with ScriptedServer(tmp_path, template, script) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="roles must alternate"):
            await client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "?"}])


async def test_a_model_without_a_tokenizer_says_what_it_lacks(server: ScriptedServer) -> None:
    server.app.vocabulary, server.app.no_vocabulary = None, "the model has no tokenizer.json"
    async with client_of(server) as client:
        with pytest.raises(openai.APIStatusError, match=r"over gRPC alone: the model has no tokenizer\.json") as caught:
            await client.completions.create(model="scripted", prompt="x")
    assert caught.value.status_code == 501


async def test_who_waits_for_a_first_token_is_told_that_the_line_is_up(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshore.generator.openai_http.work.KEEP_ALIVE_S", 0.02)
    server.engine.is_silent = True
    body = {"model": "scripted", "prompt": "x", "stream": True, "n": 2}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        httpx.AsyncClient(trust_env=False, headers=headers, timeout=20.0) as http,
        http.stream("POST", f"{server.url}/completions", json=body) as response,
    ):
        assert response.headers["content-type"] == "text/event-stream"
        lines = aiter(response.aiter_lines())
        assert [await anext(lines) for _ in range(4)] == [": still here", "", ": still here", ""]
        assert server.engine.aborted == []
    async with asyncio.timeout(20.0):
        while len(server.engine.aborted) < 2:  # noqa: ASYNC110 - the server's side of a closed connection
            await asyncio.sleep(0.01)
    assert server.engine.aborted == [request.request_id for request in server.engine.requests][::-1]
