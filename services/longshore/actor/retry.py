"""Repeating what failed because a peer was away: with growing pauses, for a bounded time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from longshore.errors import Unavailable

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


async def persist(
    call: Callable[[], Awaitable[T]],
    patience_s: float,
    on_retry: Callable[[], None] = lambda: None,
    give_up: Callable[[], bool] = lambda: False,
) -> T:
    """Calls until it does not raise Unavailable, or until `patience_s` seconds have passed since the first failure.

    Args:
        on_retry: told of every repetition.
        give_up: asked after each failure; True ends patience at once.

    Raises:
        Unavailable: patience ran out; the text is the last failure's.
    """
    pause, first_failure = _FIRST_PAUSE_S, None
    while True:
        try:
            return await call()
        except Unavailable as error:
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if now - first_failure >= patience_s or give_up():
                raise Unavailable(f"away for {now - first_failure:.0f} s: {error}") from error
        on_retry()
        # Spread out, so that a peer that comes back is not met by everybody at once.
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        pause = min(2 * pause, _LONGEST_PAUSE_S)
