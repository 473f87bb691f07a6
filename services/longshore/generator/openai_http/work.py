"""A request that the engine has taken: its replies as they grow, and the answer, whole or in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from longshore.generator.calls import HeldCall
from longshore.generator.engine import Engine, RequestFailed
from longshore.generator.openai_http import faults
from longshore.generator.openai_http.answers import Answer
from longshore.generator.openai_http.asked import Asked
from longshore.generator.openai_http.draft import Draft, Piece, Reply, Told
from longshore.generator.openai_http.exchange import KEEP_ALIVE_S, Exchange
from longshore.generator.openai_http.metrics import OpenAiMetrics
from longshore.generator.openai_http.vocabulary import Vocabulary


@dataclass
class Tally:
    """What is logged and counted of one request."""

    route: str = "unknown"
    key: str = ""
    model: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    version: int | None = None


class Work:
    """One request that the engine has taken: its replies as they grow, and the answer."""

    def __init__(
        self,
        exchange: Exchange,
        asked: Asked,
        engine: Engine,
        vocabulary: Vocabulary,
        is_chat: bool,
        tally: Tally,
        metrics: OpenAiMetrics,
        began: float,
    ) -> None:
        self.asked = asked
        self._exchange = exchange
        self._vocabulary = vocabulary
        self._tally = tally
        self._metrics = metrics
        self._began = began
        request_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{exchange.request_id.removeprefix('req-')}"
        self._answer = Answer(request_id, is_chat, asked, engine.fingerprint, vocabulary.token_text)

    async def answer(self, calls: list[HeldCall]) -> None:
        replies = [Reply() for _ in calls]

        async def keep(index: int, piece: Piece) -> None:
            replies[index].pieces.append(piece)

        await self._grow(calls, keep)
        await self._exchange.answer(200, self._answer.whole(replies))

    async def stream(self, calls: list[HeldCall]) -> None:
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

    async def _grow(self, calls: list[HeldCall], use: Callable[[int, Piece], Awaitable[None]]) -> None:
        """Draws all replies to their ends. Raises ApiError for the first that fails; the others are ended then."""
        growing = [asyncio.create_task(self._grow_one(index, call, use)) for index, call in enumerate(calls)]
        try:
            await asyncio.gather(*growing)
        finally:
            for task in growing:
                task.cancel()
            self._metrics.prompt_tokens.inc(self._tally.prompt_tokens)
            self._metrics.completion_tokens.inc(self._tally.tokens)

    async def _grow_one(self, index: int, call: HeldCall, use: Callable[[int, Piece], Awaitable[None]]) -> None:
        draft = Draft(self._vocabulary.text, self._vocabulary.hidden, self.asked.stops, self.asked.finder())
        while not draft.ended:
            event = await call.next()
            if isinstance(event, RequestFailed):
                raise faults.of_failure(event)
            if self._tally.tokens == 0 and self.asked.stream:
                self._metrics.first_token_seconds.observe(time.monotonic() - self._began)
            piece = draft.take(event)
            if draft.ended and event.finish is None:
                call.stop()
            self._tally.tokens += len(piece.token_ids)
            self._tally.version = max(self._tally.version or 0, piece.version)
            await use(index, piece)
