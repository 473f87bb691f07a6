"""What of a request is read, and when its answer is complete."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from longshore.generator.openai_http.exchange import Exchange, Gone, timeout_s
from longshore.generator.openai_http.faults import ApiError
from longshore.generator.openai_http.room import Bytes, Places

MOST = 100


def exchange(*pieces: bytes | None, **headers: str) -> tuple[Exchange, list[Any]]:
    """A request whose body comes in pieces, None for a caller that leaves; and what has not been received of it."""
    messages: list[Any] = [
        {"type": "http.disconnect"} if piece is None else {"type": "http.request", "body": piece, "more_body": True}
        for piece in pieces
    ]
    if messages:
        messages[-1]["more_body"] = False

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        """Nobody reads it."""

    told = {"content_type": "application/json", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in told.items()]
    return Exchange({"method": "POST", "path": "/", "type": "http", "headers": raw}, receive, send, "r"), messages


async def refusal(made: Exchange, room: Bytes) -> int:
    with pytest.raises(ApiError) as caught:
        await made.body(MOST, room)
    return caught.value.status


async def test_a_body_is_what_came() -> None:
    made, _ = exchange(b"a" * 40, b"b" * 60)
    assert await made.body(MOST, Bytes(MOST)) == b"a" * 40 + b"b" * 60


async def test_what_is_declared_too_large_is_not_read() -> None:
    for length in ("101", "9" * 19):
        made, left = exchange(b"x", b"y", content_length=length)
        assert await refusal(made, Bytes(MOST)) == 413
        assert len(left) == 2


async def test_what_becomes_too_large_is_not_read_on() -> None:
    for declared in ({}, {"content_length": "5"}, {"content_length": "9" * 30}, {"content_length": "-1"}):
        made, left = exchange(b"x" * 60, b"y" * 60, b"z" * 60, **declared)
        assert await refusal(made, Bytes(MOST)) == 413
        assert len(left) == 1


async def test_bodies_share_a_bound_and_give_it_back() -> None:
    room = Bytes(150)
    with room.held(100):
        made, left = exchange(b"x")
        assert await refusal(made, room) == 429
        assert len(left) == 1
        small, _ = exchange(b"x", content_length="1")
        assert await small.body(MOST, room) == b"x"
    large, _ = exchange(b"x" * 200)
    assert await refusal(large, room) == 413
    again, _ = exchange(b"x")
    assert await again.body(MOST, room) == b"x"


async def test_who_leaves_before_the_end_is_gone() -> None:
    made, _ = exchange(b"x", None)
    with pytest.raises(Gone):
        await made.body(MOST, Bytes(MOST))


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longshore.generator.openai_http.exchange._READ_TIMEOUT_S", 0.02)
    made, _ = exchange(b"x", b"y")

    async def receive() -> Any:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"", "more_body": True}

    made._receive = receive
    assert await refusal(made, Bytes(MOST)) == 408


async def test_only_plain_json_is_read() -> None:
    for headers in ({"content_type": "text/plain"}, {"content_type": ""}, {"content_encoding": "gzip"}):
        made, left = exchange(b"x", **headers)
        assert await refusal(made, Bytes(MOST)) == 415
        assert len(left) == 1
    made, _ = exchange(b"{}", content_type="Application/JSON; charset=utf-8")
    assert await made.body(MOST, Bytes(MOST)) == b"{}"


def test_a_timeout_is_the_callers_but_bounded() -> None:
    made, _ = exchange()
    assert timeout_s(made.headers, 600.0) == 600.0
    for text, seconds in (("5", 5.0), ("0.5", 0.5), ("1e9", 600.0), ("inf", 600.0)):
        made, _ = exchange(longshore_timeout=text)
        assert timeout_s(made.headers, 600.0) == seconds
    for text in ("0", "-1", "nan", "", "soon"):
        made, _ = exchange(longshore_timeout=text)
        with pytest.raises(ApiError, match="Longshore-Timeout"):
            timeout_s(made.headers, 600.0)


def test_each_key_has_places_of_its_own() -> None:
    places = Places(3)
    with places.taken("alice", 2):
        with pytest.raises(ApiError, match=r"'alice' has 2 in the works, at most 3"), places.taken("alice", 2):
            pass
        with places.taken("bob", 3), places.taken("alice", 1):
            pass
    with places.taken("alice", 3):
        pass
