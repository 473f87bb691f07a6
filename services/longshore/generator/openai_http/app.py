"""The routes of OpenAI's interface, and how a request becomes a request to the engine and its events an answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from longshore.errors import LongshoreError
from longshore.generator.calls import Call, Calls
from longshore.generator.engine import Engine, EngineLimits, EngineRequest, RequestFailed
from longshore.generator.openai_http import faults, metrics
from longshore.generator.openai_http.answers import Answer
from longshore.generator.openai_http.asked import Asked, chat, completion
from longshore.generator.openai_http.bodies import Body, ChatBody, CompletionBody, parse
from longshore.generator.openai_http.draft import Draft, Piece, Reply, Told
from longshore.generator.openai_http.exchange import KEEP_ALIVE_S, Exchange, Gone, timeout_s
from longshore.generator.openai_http.faults import ApiError
from longshore.generator.openai_http.models import Models
from longshore.generator.openai_http.room import Bytes, Places
from longshore.generator.openai_http.vocabulary import Vocabulary
from longshore.rpc.key_file import KeyFile

# A body that asks for what the context holds: token ids as JSON, and messages, tools and their schemas.
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 1024 * 1024, 32
# All bodies that are being read at a time.
_ALL_BODIES_BYTES = 256 * 1024 * 1024

_THREADS = 2

log = structlog.get_logger()


@dataclass
class _Tally:
    """What is logged and counted of one request."""

    route: str = "unknown"
    key: str = ""
    model: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    version: int | None = None


class OpenAiApp:
    """An ASGI application over the calls on one engine."""

    def __init__(
        self,
        calls: Calls,
        models: Models,
        keys: KeyFile,
        stop: asyncio.Event,
        *,
        max_request_s: float,
        replies_per_key: int,
    ) -> None:
        # None until the first version's assets are there.
        self.vocabulary: Vocabulary | None = None
        # Why there will not be any.
        self.no_vocabulary = ""
        self._calls = calls
        self._models = models
        self._keys = keys
        self._stop = stop
        self._max_request_s = max_request_s
        self._places = Places(replies_per_key)
        # Threads of its own: however much is to be tokenised, versions are staged beside it.
        self._threads = ThreadPoolExecutor(_THREADS, "openai")
        self._bodies = Bytes(_ALL_BODIES_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        began = time.monotonic()
        exchange = Exchange(scope, receive, send, f"req-{uuid.uuid4().hex}")
        tally = _Tally()
        outcome = "gone"
        try:
            await self._answered(exchange, tally)
            outcome = str(exchange.status)
        except Gone:
            pass
        except ApiError as error:
            outcome = str(error.status)
            await exchange.refuse(error)
        finally:
            metrics.REQUESTS.labels(tally.route, outcome).inc()
            log.info(
                "openai request",
                request=exchange.request_id,
                method=exchange.method,
                outcome=outcome,
                seconds=round(time.monotonic() - began, 3),
                **vars(tally),
            )

    async def _answered(self, exchange: Exchange, tally: _Tally) -> None:
        """Answers, or raises ApiError or Gone."""
        try:
            await self._route(exchange, tally)
        except LongshoreError as error:
            raise faults.of_longshore(error) from None
        except (ApiError, Gone):
            raise
        except Exception as error:
            log.error("openai request failed", request=exchange.request_id, exc_info=error)
            raise faults.internal(exchange.request_id) from None

    async def _route(self, exchange: Exchange, tally: _Tally) -> None:
        if self._stop.is_set():
            # A kept connection would go on asking a server that is ending.
            raise ApiError(503, "the generator is stopping", kind="server_error", headers={"connection": "close"})
        routes: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = {
            "/v1/chat/completions": ("POST", lambda: self._complete(exchange, tally, ChatBody)),
            "/v1/completions": ("POST", lambda: self._complete(exchange, tally, CompletionBody)),
            "/v1/models": ("GET", lambda: self._list_models(exchange)),
        }
        path = exchange.path.rstrip("/")
        name = path.removeprefix("/v1/models/")
        if path in routes:
            tally.route = path
            method, handle = routes[path]
        elif name != path:
            tally.route = "/v1/models/{model}"
            method, handle = "GET", lambda: self._one_model(exchange, name)
        else:
            known = ", ".join(routes)
            raise ApiError(404, f"there is no {exchange.path[:200]!r} here; there are {known}", code="unknown_url")
        if exchange.method != method:
            raise ApiError(405, f"{tally.route} takes {method}, not {exchange.method}", headers={"allow": method})
        tally.key = self._authorize(exchange)
        await handle()

    def _authorize(self, exchange: Exchange) -> str:
        """The name of the caller's key. Raises ApiError 401."""
        scheme, _, key = exchange.headers.get("authorization", "").partition(" ")
        name = self._keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, "send Authorization: Bearer <API key>", code="invalid_api_key", headers=headers)
        return name

    async def _list_models(self, exchange: Exchange) -> None:
        await exchange.answer(200, {"object": "list", "data": self._models.all(self._calls.engine)})

    async def _one_model(self, exchange: Exchange, name: str) -> None:
        await exchange.answer(200, self._models.one(name, self._calls.engine))

    async def _complete(self, exchange: Exchange, tally: _Tally, kind: type[ChatBody] | type[CompletionBody]) -> None:
        began = time.monotonic()
        engine = self._calls.proven()
        vocabulary = self.vocabulary
        if vocabulary is None:
            raise ApiError(501, f"the job's model can be asked over gRPC alone: {self.no_vocabulary}")
        with contextlib.ExitStack() as held:
            held.enter_context(self._places.taken(tally.key, 1))
            body: Body = parse(kind, await exchange.body(_most_bytes(engine.limits), self._bodies))
            tally.model = body.model[:100]
            pinned = self._models.version_of(body.model)
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self._threads, _understood, body, pinned, vocabulary, engine.limits)
            tally.prompt_tokens = asked.prompt_tokens
            held.enter_context(self._places.taken(tally.key, asked.num_replies - 1))
            deadline = began + timeout_s(exchange.headers, self._max_request_s)
            requests = [self._request(asked, number, deadline) for number in range(asked.num_replies)]
            work = _Work(exchange, asked, engine, vocabulary, isinstance(body, ChatBody), tally, began)
            await _unless_gone(exchange, self._draw(work, requests))

    def _request(self, asked: Asked, number: int, deadline: float) -> EngineRequest:
        prompt = number // asked.n
        return EngineRequest(
            request_id=self._calls.new_id(),
            token_ids=asked.prompts[prompt],
            sampling=asked.samplings[prompt],
            deadline=deadline,
            version=asked.version,
            watched=asked.is_watched,
        )

    async def _draw(self, work: _Work, requests: list[EngineRequest]) -> None:
        await self._calls.have_resident(requests[0])
        with contextlib.ExitStack() as opened:
            # All or none: a queue that is full half-way takes none of them.
            calls = [opened.enter_context(self._calls.open(request)) for request in requests]
            await (work.stream(calls) if work.asked.stream else work.answer(calls))


class _Work:
    """One request that the engine has taken: its replies as they grow, and the answer."""

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        engine: Engine,
        vocabulary: Vocabulary,
        is_chat: bool,
        tally: _Tally,
        began: float,
    ) -> None:
        self.asked = asked
        self._exchange = exchange
        self._vocabulary = vocabulary
        self._tally = tally
        self._began = began
        request_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{exchange.request_id.removeprefix('req-')}"
        self._answer = Answer(request_id, is_chat, asked, engine.fingerprint, vocabulary.token_text)

    async def answer(self, calls: list[Call]) -> None:
        replies = [Reply() for _ in calls]

        async def keep(index: int, piece: Piece) -> None:
            replies[index].pieces.append(piece)

        await self._grow(calls, keep)
        await self._exchange.answer(200, self._answer.whole(replies))

    async def stream(self, calls: list[Call]) -> None:
        told = [Told() for _ in calls]
        newest = 0

        async def tell(index: int, piece: Piece) -> None:
            nonlocal newest
            newest = max(newest, piece.version)
            chunk = self._answer.chunk(index, piece, told[index])
            told[index].add(piece)
            if chunk is not None:
                await self._exchange.event(chunk)

        keeping = asyncio.create_task(self._keep_alive())
        try:
            await self._grow(calls, tell)
        finally:
            keeping.cancel()
        if self.asked.include_usage:
            await self._exchange.event(self._answer.last_chunk(newest, sum(item.tokens for item in told)))
        await self._exchange.done()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            await self._exchange.keep_alive()

    async def _grow(self, calls: list[Call], use: Callable[[int, Piece], Awaitable[None]]) -> None:
        """Draws all replies to their ends. Raises ApiError for the first that fails; the others are ended then."""
        growing = [asyncio.create_task(self._grow_one(index, call, use)) for index, call in enumerate(calls)]
        try:
            await asyncio.gather(*growing)
        finally:
            for task in growing:
                task.cancel()
            metrics.TOKENS.labels("prompt").inc(self._tally.prompt_tokens)
            metrics.TOKENS.labels("completion").inc(self._tally.tokens)

    async def _grow_one(self, index: int, call: Call, use: Callable[[int, Piece], Awaitable[None]]) -> None:
        draft = Draft(self._vocabulary.text, self._vocabulary.hidden, self.asked.stops, self.asked.finder())
        while not draft.ended:
            event = await call.next()
            if isinstance(event, RequestFailed):
                raise faults.of_failure(event)
            if self._tally.tokens == 0 and self.asked.stream:
                metrics.FIRST_TOKEN_SECONDS.observe(time.monotonic() - self._began)
            piece = draft.take(event)
            if draft.ended and event.finish is None:
                call.stop()
            self._tally.tokens += len(piece.token_ids)
            self._tally.version = max(self._tally.version or 0, piece.version)
            await use(index, piece)


def _understood(body: Body, pinned: int | None, vocabulary: Vocabulary, limits: EngineLimits) -> Asked:
    if isinstance(body, ChatBody):
        return chat(body, pinned, vocabulary.renderer, limits)
    assert isinstance(body, CompletionBody)
    return completion(body, pinned, vocabulary.renderer, limits)


async def _unless_gone(exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, unless the caller leaves before it is done: raises Gone then."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(exchange.until_gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        # Who has been sent all of it may leave.
        if not working.done() and not exchange.is_answered:
            raise Gone
        await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _most_bytes(limits: EngineLimits) -> int:
    return min(_BODY_BYTES + _BODY_BYTES_PER_TOKEN * limits.context, _ALL_BODIES_BYTES)
