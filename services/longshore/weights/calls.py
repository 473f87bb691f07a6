"""How the client calls the store: deadlines, repetition while the store is away, and errors by their kind."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from longshore.errors import Conflict, LongshoreError, NotFound, Rejected, Unavailable

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

# CANCELLED is what a server that is stopping answers; our own cancellation is asyncio.CancelledError.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Backoff:
    """Pauses that double up to two seconds, scattered so that many clients do not come back at once."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._pause_s = _FIRST_PAUSE_S

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


async def repeat(
    attempt: Callable[[float], Awaitable[T]], timeout: float, precondition: type[Conflict] = Conflict
) -> T:
    """Runs `attempt`, which must be idempotent, again while the store is away and the deadline is not past.

    Args:
        attempt: is given the seconds that are left.
        timeout: seconds for all attempts.
        precondition: what the answer FAILED_PRECONDITION means.

    Raises:
        Unavailable: the deadline came first. Other LongshoreErrors are what the store answered.
    """
    deadline = time.monotonic() + timeout
    backoff = Backoff()
    while True:
        try:
            return await attempt(max(0.0, deadline - time.monotonic()))
        except grpc.aio.AioRpcError as error:
            reason = translated(error, precondition)
            if error.code() not in _AWAY:
                raise reason from None
        except Unavailable as error:
            reason = error
        pause = backoff.next()
        if time.monotonic() + pause >= deadline:
            raise reason
        await asyncio.sleep(pause)


def translated(error: grpc.aio.AioRpcError, precondition: type[Conflict] = Conflict) -> LongshoreError:
    """What a failed call means."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(details)
    if code is grpc.StatusCode.ALREADY_EXISTS:
        return Conflict(details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return precondition(details)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return Rejected("refused", details)
    return Unavailable(f"weight store: {code.name.lower()}: {details}")
