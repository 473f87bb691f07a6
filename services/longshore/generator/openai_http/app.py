"""The routes of OpenAI's interface: who may ask, what was asked, and what becomes of it when that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from longshore.errors import LongshoreError
from longshore.generator.calls import Calls
from longshore.generator.engine import EngineLimits, EngineRequest
from longshore.generator.openai_http import faults
from longshore.generator.openai_http.asked import Asked, chat, completion
from longshore.generator.openai_http.bodies import Body, ChatBody, CompletionBody, parse
from longshore.generator.openai_http.exchange import Exchange, Gone, timeout_s
from longshore.generator.openai_http.faults import ApiError
from longshore.generator.openai_http.metrics import OpenAiMetrics
from longshore.generator.openai_http.models import Models
from longshore.generator.openai_http.room import Bytes, Places
from longshore.generator.openai_http.vocabulary import Vocabulary
from longshore.generator.openai_http.work import Tally, Work
from longshore.rpc.key_file import KeyFile

# A body that asks for what the context holds: token ids as JSON, and messages, tools and their schemas.
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 1024 * 1024, 32
# All bodies that are being read at a time.
_ALL_BODIES_BYTES = 256 * 1024 * 1024
# Threads that render and tokenise.
_THREADS = 2

log = structlog.get_logger()


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
        self._metrics = OpenAiMetrics(models.job)
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
        tally = Tally()
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
            self._metrics.count(tally.route, outcome)
            log.info(
                "openai request",
                request=exchange.request_id,
                method=exchange.method,
                outcome=outcome,
                seconds=round(time.monotonic() - began, 3),
                **vars(tally),
            )

    async def _answered(self, exchange: Exchange, tally: Tally) -> None:
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

    async def _route(self, exchange: Exchange, tally: Tally) -> None:
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

    async def _complete(self, exchange: Exchange, tally: Tally, kind: type[ChatBody] | type[CompletionBody]) -> None:
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
            work = Work(exchange, asked, engine, vocabulary, isinstance(body, ChatBody), tally, self._metrics, began)
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

    async def _draw(self, work: Work, requests: list[EngineRequest]) -> None:
        await self._calls.have_resident(requests[0])
        with contextlib.ExitStack() as opened:
            # All or none: a queue that is full half-way takes none of them.
            calls = [opened.enter_context(self._calls.open(request)) for request in requests]
            await (work.stream(calls) if work.asked.stream else work.answer(calls))


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
