"""Bounded persistence."""

from __future__ import annotations

import asyncio
import time

import pytest

from longshore.actor import retry
from longshore.actor.retry import persist
from longshore.errors import Rejected, Unavailable


class Flaky:
    """Fails `failures` times, then answers."""

    def __init__(self, failures: float, error: Exception | None = None) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error or Unavailable("away")

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return "here"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 0.01)


async def test_repeats_until_the_peer_is_back() -> None:
    call, retries = Flaky(5), []
    assert await persist(call, 30, lambda: retries.append(1)) == "here"
    assert (call.calls, len(retries)) == (6, 5)


async def test_patience_ends() -> None:
    call = Flaky(float("inf"))
    with pytest.raises(Unavailable, match=r"away for \d+ s: away"):
        await persist(call, 0.05)
    assert call.calls > 2


async def test_patience_counts_from_the_first_failure() -> None:
    async def slow() -> str:
        await asyncio.sleep(0.1)
        return "here"

    assert await persist(slow, 0.01) == "here"


async def test_other_errors_are_not_repeated() -> None:
    call = Flaky(5, Rejected("prompt", "no"))
    with pytest.raises(Rejected):
        await persist(call, 30)
    assert call.calls == 1


async def test_giving_up_ends_it_at_once() -> None:
    call, started = Flaky(float("inf")), time.monotonic()
    with pytest.raises(Unavailable):
        await persist(call, 30, give_up=lambda: call.calls >= 3)
    assert call.calls == 3
    assert time.monotonic() - started < 10
