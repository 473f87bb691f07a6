"""One HTTP request and its answer, over ASGI: what comes in is bounded, and a caller who leaves is noticed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from longshore.generator.openai_http.faults import ApiError, bad
from longshore.generator.openai_http.room import Bytes

_READ_TIMEOUT_S = 30.0
# Often enough that proxies keep the connection.
KEEP_ALIVE_S = 15.0


class Gone(Exception):
    """The caller has left; nobody reads an answer."""


class Exchange:
    """Reads one request, and sends its answer as one JSON document or as a stream of events."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = Headers(scope=scope)
        self.request_id = request_id
        # None until there is one.
        self.status: int | None = None
        self.is_answered = False
        self._receive = receive
        self._send = send
        # Replies of one answer share the connection.
        self._sending = asyncio.Lock()

    async def body(self, most: int, room: Bytes) -> bytes:
        """The request's body. Raises ApiError (400, 408, 413, 415, 429), Gone."""
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, f"send Content-Type: application/json, not {media_type[:100] or 'nothing'}")
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "send the body as it is, without Content-Encoding")
        # What says that it is too large is not read at all.
        declared = self.headers.get("content-length", "")
        size = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else most
        if size > most:
            raise _too_large(most)
        with room.held(size):
            try:
                async with asyncio.timeout(_READ_TIMEOUT_S):
                    return await self._read(most)
            except TimeoutError:
                message = f"the body did not arrive within {_READ_TIMEOUT_S:.0f} s"
                raise ApiError(408, message, headers={"connection": "close"}) from None

    async def _read(self, most: int) -> bytes:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > most:
                raise _too_large(most)
            if not message.get("more_body", False):
                return bytes(body)

    async def until_gone(self) -> None:
        """Returns when the caller has left; to be called once the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Sends the whole answer."""
        body = _json(document) + b"\n"
        more = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        await self._start(status, more)
        self.is_answered = True
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: ApiError) -> None:
        """Sends an error: as the answer, or as the last event of a stream that has begun."""
        if self.status is None:
            await self.answer(error.status, error.body, error.headers)
            return
        await self.event(error.body)
        await self.end()

    async def event(self, document: dict[str, Any]) -> None:
        """Sends one event of a stream, after the headers if need be."""
        await self._event(b"data: " + _json(document) + b"\n\n")

    async def keep_alive(self) -> None:
        """Sends what clients overlook."""
        await self._event(b": still here\n\n")

    async def done(self) -> None:
        """Ends a stream as it should end."""
        await self._event(b"data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        """Ends a stream."""
        async with self._sending:
            self.is_answered = True
            await self._send({"type": "http.response.body", "body": b""})

    async def _event(self, text: bytes) -> None:
        async with self._sending:
            if self.status is None:
                await self._start(200, {"content-type": "text/event-stream", "x-accel-buffering": "no"})
            await self._send({"type": "http.response.body", "body": text, "more_body": True})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        every = {"cache-control": "no-store", "x-request-id": self.request_id, **headers}
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


def timeout_s(headers: Headers, most: float) -> float:
    """Seconds that a request may take: its Longshore-Timeout, but `most` at the longest. Raises ApiError 400."""
    asked = headers.get("longshore-timeout")
    if asked is None:
        return most
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    # A NaN fails this comparison too.
    if not seconds > 0.0:
        raise bad("Longshore-Timeout", f"Longshore-Timeout: must be a number of seconds above 0, got {asked[:40]!r}")
    return min(seconds, most)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes, which this model's context could never need")


def _json(document: dict[str, Any]) -> bytes:
    # ASCII: half characters of a model's text have no UTF-8.
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii")
