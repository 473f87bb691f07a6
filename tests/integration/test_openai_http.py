"""The OpenAI-compatible interface of a real generator process, asked with OpenAI's own client."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from openai_site import CONTEXT, KEY, MAX_WAITING, SERVICE, SLOTS, WAIT_S, OpenAiSite
from tiny_llama import reference_logprobs
from tiny_tokenizer import SPECIAL

from longshore.proto.v1 import generator_pb2
from longshore.rpc.key_file import digest_line
from longshore.tasks.rendering import Renderer
from longshore.types import Message

HELLO: list[Any] = [{"role": "user", "content": "Hi there"}]
# Ids of the whole vocabulary: whatever is drawn first ends a reply.
EVERYTHING = list(range(64))
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
# A version that nobody publishes: who asks for it waits.
NEVER = {"longshore": {"min_version": 10**6}}


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAiSite]:
    site = OpenAiSite(tmp_path_factory.mktemp("openai"))
    try:
        yield site
    finally:
        site.stop()


@pytest.fixture
async def site(whole_site: OpenAiSite) -> OpenAiSite:
    if not whole_site.models:
        await whole_site.publish()
    await asyncio.to_thread(whole_site.generator.wait_serving, SERVICE)
    return whole_site


@pytest.fixture
async def client(site: OpenAiSite) -> AsyncIterator[openai.AsyncOpenAI]:
    async with site.async_client() as client:
        yield client


@pytest.fixture
async def http(site: OpenAiSite) -> AsyncIterator[httpx.AsyncClient]:
    """For what OpenAI's client would not send."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=site.url, headers=headers, timeout=WAIT_S, trust_env=False) as http:
        yield http


def renderer(site: OpenAiSite) -> Renderer:
    return Renderer(site.tokenizer())


async def until(site: OpenAiSite, condition: Callable[[generator_pb2.GetStatusResponse], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition(await site.status()):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


async def test_before_a_version_is_proven_there_is_a_503(whole_site: OpenAiSite) -> None:
    if whole_site.models:
        pytest.skip("another test has published a version already")
    await asyncio.to_thread(whole_site.generator.wait_serving)
    async with whole_site.async_client() as client:
        with pytest.raises(openai.InternalServerError, match="no policy version has been proven yet") as caught:
            await client.chat.completions.create(model="first-light", messages=HELLO)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")


async def test_a_chat_answer_has_text_tokens_logprobs_and_what_drew_them(
    site: OpenAiSite, client: openai.AsyncOpenAI
) -> None:
    answer = await client.chat.completions.create(
        model="first-light",
        messages=HELLO,
        max_tokens=12,
        temperature=0.7,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    fields: dict[str, Any] = answer.model_dump()
    (choice,) = fields["choices"]
    prompt = renderer(site).prompt_ids([Message("user", "Hi there")])
    assert fields["prompt_token_ids"] == prompt
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == renderer(site).text(choice["token_ids"])
    version = (await site.status()).policy_version
    assert fields["policy_version"] == version
    assert fields["system_fingerprint"].startswith("torch-slots-")
    assert fields["system_fingerprint"].endswith(f"@{version}")
    assert choice["spans"] == [
        {"start": 0, "length": len(choice["token_ids"]), "policy_version": version, "kv": "recomputed"}
        | {"kv_min_version": None}
    ]
    drawn = len(choice["token_ids"])
    assert fields["usage"] | {"prompt_tokens_details": None, "completion_tokens_details": None} == {
        "prompt_tokens": len(prompt),
        "completion_tokens": drawn,
        "total_tokens": len(prompt) + drawn,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    expected = reference_logprobs(site.models[version], prompt, choice["token_ids"], 0.7)
    torch.testing.assert_close(torch.tensor(choice["token_logprobs"]), expected, atol=1e-4, rtol=0)
    told = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert told == choice["token_logprobs"]
    texts = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert "".join(text for text in texts if text not in SPECIAL) == choice["message"]["content"]


async def test_a_stream_is_the_same_answer_in_pieces(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="first-light",
        messages=HELLO,
        max_tokens=40,
        n=2,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks: list[dict[str, Any]] = [chunk.model_dump() async for chunk in stream]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    parts = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    tokens = 0
    for index in range(2):
        own = [part for part in parts if part["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] in ("stop", "length")
        token_ids = [token for part in own for token in part["token_ids"]]
        assert "".join(part["delta"]["content"] or "" for part in own) == renderer(site).text(token_ids)
        # Tokens come as they are drawn.
        assert len(own) >= len(token_ids)
        spans = [span for part in own for span in part["spans"]]
        assert [span["start"] for span in spans] == [0, *itertools.accumulate(span["length"] for span in spans)][:-1]
        told = [entry["logprob"] for part in own for entry in part["logprobs"]["content"]]
        assert told == [value for part in own for value in part["token_logprobs"]]
        tokens += len(token_ids)
    assert chunks[-1]["usage"]["completion_tokens"] == tokens
    assert chunks[0]["prompt_token_ids"] == renderer(site).prompt_ids([Message("user", "Hi there")])


async def test_completions_take_texts_and_token_ids_one_or_many(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    ids = renderer(site).text_ids("ab")
    for prompt in ("ab", ids, ["ab"], [ids]):
        answer = await client.completions.create(
            model="first-light", prompt=prompt, max_tokens=5, logprobs=0, extra_body={"return_token_ids": True}
        )
        (choice,) = answer.choices
        assert choice.model_extra is not None
        assert choice.model_extra["prompt_token_ids"] == ids
        assert choice.text == renderer(site).text(choice.model_extra["token_ids"])
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == choice.model_extra["token_logprobs"]
    many = await client.completions.create(
        model="first-light", prompt=["a", "bcd"], n=2, max_tokens=3, extra_body={"return_token_ids": True}
    )
    prompts = [choice.model_extra["prompt_token_ids"] for choice in many.choices if choice.model_extra]
    assert [len(prompt) for prompt in prompts] == [1, 1, 3, 3]
    assert many.usage is not None
    assert many.usage.prompt_tokens == 4
    stream = await client.completions.create(model="first-light", prompt="ab", max_tokens=5, stream=True)
    assert len([chunk.choices[0].text async for chunk in stream]) >= 1


async def test_a_stop_string_ends_a_reply_at_the_token_that_completes_it(
    site: OpenAiSite, client: openai.AsyncOpenAI
) -> None:
    for stream in (False, True):
        answer: Any = await client.completions.create(
            model="first-light",
            prompt="count",
            max_tokens=1000,
            stop=["e", "qu", "t"],
            stream=stream,
            extra_body={"return_token_ids": True},
        )
        parts = [chunk async for chunk in answer] if stream else [answer]
        choices = [choice for part in parts for choice in part.choices]
        text = "".join(choice.text for choice in choices)
        token_ids = [token for choice in choices for token in choice.token_ids]
        assert choices[-1].finish_reason == "stop"
        assert not any(stop in text for stop in ("e", "qu", "t"))
        whole = renderer(site).text(token_ids)
        assert whole.startswith(text)
        assert whole[len(text) :] in ("e", "qu", "t")
    await until(site, lambda status: status.running_requests == 0)


async def test_a_stop_token_ends_a_reply_and_is_not_said(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="first-light",
        prompt="ab",
        max_tokens=1000,
        extra_body={"stop_token_ids": EVERYTHING, "return_token_ids": True},
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.model_extra is not None
    assert choice.text == renderer(site).text(choice.model_extra["token_ids"][:-1])


async def test_temperature_zero_takes_the_likeliest_tokens(client: openai.AsyncOpenAI) -> None:
    asked = [client.completions.create(model="first-light", prompt="ab", max_tokens=20, temperature=0) for _ in "123"]
    texts = {answer.choices[0].text for answer in await asyncio.gather(*asked)}
    assert len(texts) == 1


async def test_models_are_listed_under_both_names(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    version = (await site.status()).policy_version
    listed = [model.id async for model in await client.models.list()]
    assert listed[:3] == [site.job.job, "first-light", f"{site.job.job}@{version}"]
    for name in (site.job.job, "first-light", f"first-light@{version}"):
        model = await client.models.retrieve(name)
        assert model.model_extra is not None
        assert (model.id, model.model_extra["policy_version"]) == (name, version)
        assert model.model_extra["max_model_len"] == CONTEXT
    for name in ("gpt-4o", "first-light@", "first-light@-1", "first-light@1.5", f"{site.job.job}@x"):
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            await client.models.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model=name, messages=HELLO)


async def test_a_pinned_version_answers_beside_a_newer_one(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    old = (await site.status()).policy_version
    new = await site.publish()
    await until(site, lambda status: status.policy_version == new)

    async def version_of(model: str, **bounds: int) -> int:
        answer = await client.completions.create(
            model=model, prompt="ab", max_tokens=3, extra_body={"longshore": bounds} if bounds else None
        )
        assert answer.model_extra is not None
        return int(answer.model_extra["policy_version"])

    assert await version_of("first-light") == new
    assert await version_of(f"first-light@{old}") == old
    assert await version_of("first-light", min_version=old, max_version=old) == old
    assert await version_of("first-light", min_version=new) == new
    with pytest.raises(openai.BadRequestError, match="exclude version"):
        await version_of(f"first-light@{old}", min_version=new)
    with pytest.raises(openai.BadRequestError, match="is above max_version"):
        await version_of("first-light", min_version=2, max_version=1)


async def test_a_swap_under_a_stream_is_told(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    old = (await site.status()).policy_version
    stream = await client.completions.create(model="first-light", prompt="x", max_tokens=1900, stream=True)
    spans: list[dict[str, Any]] = []
    published = False
    async for chunk in stream:
        assert chunk.choices[0].model_extra is not None
        spans += chunk.choices[0].model_extra["spans"]
        if not published:
            published, new = True, await site.publish()
    assert {(span["policy_version"], span["kv"], span["kv_min_version"]) for span in spans} == {
        (old, "recomputed", None),
        (new, "carried", old),
    }


async def test_tools_reach_the_prompt_and_results_come_back(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    talk: list[Any] = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]

    async def prompt_of(**more: Any) -> str:
        answer = await client.chat.completions.create(
            model="first-light", messages=talk, max_tokens=1, extra_body={"return_token_ids": True}, **more
        )
        assert answer.model_extra is not None
        return renderer(site).full_text(answer.model_extra["prompt_token_ids"])

    with_tools = await prompt_of(tools=[TOOL])
    assert '"name": "add"' in with_tools.split("<tool_call>")[0]
    assert "<|im_start|>user\n1+2?<|im_end|>" in with_tools
    assert '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>' in with_tools
    assert "<|im_start|>tool\n3<|im_end|>" in with_tools
    assert "Adds two numbers" not in await prompt_of(tools=[TOOL], tool_choice="none")
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        await prompt_of(tools=[TOOL], tool_choice="required")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("top_p", 0.9), ("frequency_penalty", 0.1), ("presence_penalty", -1.0), ("logit_bias", {"5": 1})),
        *(("response_format", {"type": "json_object"}), ("top_logprobs", 3), ("n", 0), ("n", 129), ("max_tokens", 0)),
        *(("stop", ["x"] * 9), ("stop", ""), ("temperature", -1.0), ("temperature", 1e-30), ("store", True)),
        *(("parallel_tool_calls", False), ("reasoning_effort", "low")),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(client: openai.AsyncOpenAI, field: str, value: object) -> None:
    more: dict[str, Any] = {field: value, **({"logprobs": True} if field == "top_logprobs" else {})}
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        await client.chat.completions.create(model="first-light", messages=HELLO, **more)
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("field", ["top_k", "min_p", "repetition_penalty", "guided_json", "use_beam_search"])
async def test_fields_of_other_servers_are_refused_by_name(client: openai.AsyncOpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        await client.chat.completions.create(model="first-light", messages=HELLO, extra_body={field: 0.5})


async def test_what_changes_nothing_is_taken(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="first-light",
        messages=HELLO,
        max_completion_tokens=2,
        top_p=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        user="somebody",
        seed=7,
        metadata={"a": "b"},
        extra_body={"top_k": -1, "min_p": 0},
    )
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 2
    assert answer.model_extra is not None
    assert "seed is ignored" in answer.model_extra["warnings"][0]


async def test_too_long_a_prompt_says_how_long(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{CONTEXT} tokens leave no room") as caught:
        await client.completions.create(model="first-light", prompt=[5] * CONTEXT)
    assert caught.value.code == "context_length_exceeded"
    for prompt in ([100], [-1], [], [[]], "", [[5], []]):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            await client.completions.create(model="first-light", prompt=prompt)  # type: ignore[arg-type]


async def is_let_in(client: openai.AsyncOpenAI) -> bool:
    try:
        await client.models.list()
    except openai.AuthenticationError:
        return False
    return True


async def test_wrong_keys_are_refused_and_new_ones_let_in(site: OpenAiSite) -> None:
    async with site.async_client("another") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
        assert caught.value.code == "invalid_api_key"
        before = site.keys_file.read_text()
        site.keys_file.write_text(before + digest_line("bob", "another"))
        async with asyncio.timeout(WAIT_S):
            while not await is_let_in(client):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
        site.keys_file.write_text("no key at all")
        # Long enough for it to be read.
        await asyncio.sleep(1.2)
        assert await is_let_in(client)
        site.keys_file.write_text(before)
        async with asyncio.timeout(WAIT_S):
            while await is_let_in(client):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
    log = site.generator.log.read_text()
    assert "another" not in log
    assert KEY not in log


async def test_a_callers_timeout_ends_the_reply(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).completions.create(model="first-light", prompt="x", extra_body=NEVER)
    await until(site, lambda status: status.waiting_requests == 0)
    with pytest.raises(openai.InternalServerError, match="deadline") as caught:
        await client.completions.create(
            model="first-light", prompt="x", extra_body=NEVER, extra_headers={"Longshore-Timeout": "0.2"}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    stream = await client.completions.create(
        model="first-light",
        prompt="x",
        max_tokens=2000,
        stream=True,
        n=SLOTS,
        extra_headers={"Longshore-Timeout": "0.4"},
    )
    with pytest.raises(openai.APIError, match="deadline"):
        _ = [chunk async for chunk in stream]
    for wrong in ("-1", "nan", "soon"):
        with pytest.raises(openai.BadRequestError, match="Longshore-Timeout"):
            await client.completions.create(model="first-light", prompt="x", extra_headers={"Longshore-Timeout": wrong})


async def test_a_caller_that_leaves_in_mid_stream_frees_its_slot(site: OpenAiSite) -> None:
    gone = site.metric("longshore_generator_openai_requests_total", outcome="gone")
    for _ in range(2):
        async with site.async_client() as client:
            stream = await client.completions.create(
                model="first-light", prompt="x", max_tokens=1900, n=SLOTS, stream=True
            )
            await anext(aiter(stream))
            await stream.close()
        await until(site, lambda status: status.running_requests == status.waiting_requests == 0)
    assert site.metric("longshore_generator_openai_requests_total", outcome="gone") == gone + 2


async def test_a_full_queue_is_a_429(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    waiting = [
        asyncio.create_task(client.completions.create(model="first-light", prompt="x", n=SLOTS, extra_body=NEVER))
        for _ in range((SLOTS + MAX_WAITING) // SLOTS)
    ]
    await until(site, lambda status: status.waiting_requests == SLOTS + MAX_WAITING)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="first-light", prompt="x")
    assert caught.value.response.headers["retry-after"] == "1"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await until(site, lambda status: status.waiting_requests == 0)
    # More replies than one key may have.
    with pytest.raises(openai.RateLimitError, match="'alice'"):
        await client.completions.create(model="first-light", prompt="x", n=65)


async def test_bodies_that_are_no_requests_are_refused_and_the_server_goes_on(
    site: OpenAiSite, http: httpx.AsyncClient
) -> None:
    chat = b'{"model": "first-light", "max_tokens": 2, "messages": [{"role": "user", "content": %s}]}'
    bodies = [
        *(b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "first-light"}', b'{"messages": []}'),
        *(b'{"a":' * 100_000, b"[" * 100_000, chat % (b"[" * 5000 + b"]" * 5000), chat % b'"\\ud800"', chat % b"5"),
        *(chat % b"NaN", chat % b"1e999", chat % b'{"a": 1}', chat % b'[{"type": "image_url"}]', chat % b"[1]"),
        b'{"model": "first-light", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "first-light", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "first-light", "messages": [{"role": "user", "content": "x"}], "n": %s}' % (b"9" * 5000),
        b'{"model": "first-light", "messages": [{"role": "robot", "content": "x"}]}',
        b'{"model": "first-light", "messages": [{"role": "user", "content": "x"}], "max_tokens": true}',
    ]
    for body in bodies:
        response = await http.post("/chat/completions", content=body)
        assert response.status_code == 400, (body[:80], response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (await http.post("/chat/completions", content=chat % b'"x\\u0000y"')).status_code == 200
    assert (await http.post("/chat/completions", json={}, headers={"Content-Type": "text/plain"})).status_code == 415
    gzipped = {"Content-Encoding": "gzip"}
    assert (await http.post("/chat/completions", content=b"x", headers=gzipped)).status_code == 415
    for path in ("/nothing", "/chat", "/../metrics", "/models/%00", "/models/%F0%9F%A6%8A"):
        response = await http.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["message"]
    assert (await http.get("/chat/completions")).headers["allow"] == "POST"


async def test_a_gigabyte_is_refused_without_being_read(site: OpenAiSite, http: httpx.AsyncClient) -> None:
    async def much() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * (1024 * 1024)

    declared = await http.post("/chat/completions", content=much(), headers={"Content-Length": str(64 * 1024 * 1024)})
    assert declared.status_code == 413
    chunked = await http.post("/chat/completions", content=much())
    assert chunked.status_code == 413
    assert chunked.json()["error"]["type"] == "invalid_request_error"


async def test_every_answer_has_an_id_that_the_log_has(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    raw = await client.completions.with_raw_response.create(model="first-light", prompt="ab", max_tokens=2)
    answer = raw.parse()
    request_id = raw.headers["x-request-id"]
    assert answer.id == f"cmpl-{request_id.removeprefix('req-')}"
    # It is written when the answer has gone.
    async with asyncio.timeout(WAIT_S):
        while not (found := [line for line in site.generator.log.read_text().splitlines() if request_id in line]):  # noqa: ASYNC110 - a file
            await asyncio.sleep(0.01)
    (line,) = map(json.loads, found)
    assert (line["event"], line["key"], line["outcome"], line["prompt_tokens"]) == ("openai request", "alice", "200", 2)
    assert answer.usage is not None
    assert line["tokens"] == answer.usage.completion_tokens


async def test_metrics_count_requests_and_tokens(site: OpenAiSite, client: openai.AsyncOpenAI) -> None:
    def counts() -> list[float]:
        prefix = "longshore_generator_openai"
        route = {"route": "/v1/completions", "outcome": "200"}
        return [
            site.metric(f"{prefix}_requests_total", **route),
            site.metric(f"{prefix}_tokens_total", kind="prompt"),
            site.metric(f"{prefix}_tokens_total", kind="completion"),
            site.metric(f"{prefix}_first_token_seconds_count"),
        ]

    before = counts()
    stream = await client.completions.create(
        model="first-light", prompt="ab", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage async for chunk in stream][-1]
    assert usage is not None
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 2, usage.completion_tokens, 1]


def test_the_client_without_asyncio_works_too(whole_site: OpenAiSite) -> None:
    assert whole_site.models
    with whole_site.client() as client:
        stream = client.chat.completions.create(model="first-light", messages=HELLO, max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) is not None
        answer = client.chat.completions.create(model="first-light", messages=HELLO, max_tokens=4)
        assert answer.choices[0].finish_reason in ("stop", "length")


async def test_sigterm_lets_streams_end_and_takes_the_address_back(site: OpenAiSite) -> None:
    assert site.url_file.read_text().strip() == site.url
    async with site.async_client() as client:
        stream = await client.completions.create(model="first-light", prompt="x", max_tokens=600, stream=True)
        chunks = aiter(stream)
        await anext(chunks)
        assert site.generator.process is not None
        site.generator.process.terminate()
        last = [chunk async for chunk in chunks][-1]
        assert last.choices[0].finish_reason in ("stop", "length")
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            await client.models.list()
    assert await asyncio.to_thread(site.generator.wait, WAIT_S) == 0
    assert not site.url_file.exists()
