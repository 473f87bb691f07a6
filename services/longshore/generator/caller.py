"""One caller's stream: the requests that it has open, and what is to be told of them. Knows no gRPC.

What comes while a message is on its way is told in the next one, whichever requests it is of.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

import structlog

from longshore.errors import Conflict, IntegrityError, LongshoreError, Rejected, Unavailable
from longshore.generator.calls import Call, Calls
from longshore.generator.engine import EngineEvent, EngineRequest, QueueFull

# Events of one message: about a megabyte, for engines tell of a few dozen tokens in one.
_MOST_TOLD = 4096

log = structlog.get_logger()


class NotHere(Unavailable):
    """The pinned version cannot be had at this generator now; nothing is wrong with the request, nor with others."""


class Running(Conflict):
    """A request with this id is running."""


@dataclass(frozen=True)
class Refused:
    """A request's only event when the engine never got it."""

    error: LongshoreError


@dataclass(frozen=True)
class Told:
    """An event of the request that the stream knows by a number; `is_first` is its first one."""

    number: int
    event: EngineEvent | Refused
    is_first: bool


@dataclass
class _Open:
    name: str
    call: Call
    is_new: bool = True


class Caller:
    """Belongs to one stream; ended by `close`."""

    def __init__(self, calls: Calls, names: set[str]) -> None:
        """
        Args:
            names: ids of the callers' own, of all requests that run here; kept up to date.
        """
        self._calls = calls
        self._names = names
        # By the stream's number for it.
        self._open: dict[int, _Open] = {}
        # Requests whose version is being brought.
        self._coming: dict[int, asyncio.Task[None]] = {}
        # Of each request bounded by the tokens of its reply; `has_room` bounds what is not.
        self._outbox: list[Told] = []
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._is_last = False
        self._broken: Exception | None = None

    # -- what is asked

    def begin(self, number: int, name: str, request: EngineRequest) -> None:
        """Takes a request; its events follow, or why there are none.

        Raises:
            Rejected: the number is that of a request that is open: of which of them would events be?
        """
        self.check(number)
        if self._calls.is_resident(request):
            self._submit(number, name, request)
        elif len(self._coming) >= self._calls.proven().limits.max_waiting:
            self.refuse(number, QueueFull(f"{len(self._coming)} requests wait for their versions already"))
        else:
            self._coming[number] = asyncio.create_task(self._bring(number, name, request))

    def check(self, number: int) -> None:
        """Raises Rejected: see `begin`."""
        if number in self._open or number in self._coming:
            raise Rejected("malformed", f"call {number} has not ended")

    def refuse(self, number: int, error: LongshoreError) -> None:
        self._tell(Told(number, Refused(error), True))

    def fail(self, number: int, error: Exception) -> None:
        """A bug that one request meets must not end the others. Its text may hold anything: that is for our log."""
        log.error("request failed", exc_info=error)
        self.refuse(number, LongshoreError("internal error; see the generator's log"))

    def cancel(self, number: int) -> None:
        """Ends a request without a further event; unknown numbers are ignored."""
        coming = self._coming.pop(number, None)
        if coming is not None:
            coming.cancel()
        if number in self._open:
            self._end(self._open.pop(number))
        self._wake.set()

    def no_more(self, broken: Exception | None = None) -> None:
        """No further request comes: `told` ends when all have ended, or raises what broke the stream."""
        self._is_last = True
        self._broken = broken
        self._wake.set()

    async def has_room(self) -> None:
        """Returns when the caller has been told enough to ask for more."""
        while len(self._outbox) >= _MOST_TOLD:
            self._drained.clear()
            await self._drained.wait()

    # -- what is told

    async def told(self) -> list[Told]:
        """What is to be told next; empty: nothing will be any more. Raises what broke the stream."""
        while not self._outbox:
            if self._broken is not None:
                raise self._broken
            if self._is_last and not self._open and not self._coming:
                return []
            self._wake.clear()
            await self._wake.wait()
        told, self._outbox = self._outbox[:_MOST_TOLD], self._outbox[_MOST_TOLD:]
        self._drained.set()
        return told

    def close(self) -> None:
        """Ends all requests that have not ended."""
        for number in [*self._coming, *self._open]:
            self.cancel(number)

    async def _bring(self, number: int, name: str, request: EngineRequest) -> None:
        try:
            await self._calls.have_resident(request)
        except (IntegrityError, Unavailable) as error:
            self.refuse(number, NotHere(f"the pinned version cannot be had here now: {error}"))
        except LongshoreError as error:
            self.refuse(number, error)
        except Exception as error:  # noqa: BLE001 - a request's boundary
            self.fail(number, error)
        else:
            self._submit(number, name, request)
        finally:
            # One that was cancelled has left already, and another may have its number.
            if self._coming.get(number) is asyncio.current_task():
                del self._coming[number]

    def _submit(self, number: int, name: str, request: EngineRequest) -> None:
        if name in self._names:
            self.refuse(number, Running(f"request {name!r} is running"))
            return
        try:
            call = self._calls.begin(request, partial(self._take, number))
        except LongshoreError as error:
            self.refuse(number, error)
            return
        self._open[number] = _Open(name, call)
        self._names.add(name)

    def _take(self, number: int, event: EngineEvent) -> None:
        opened = self._open[number]
        if opened.call.is_over:
            self._end(self._open.pop(number))
        self._tell(Told(number, event, opened.is_new))
        opened.is_new = False

    def _end(self, opened: _Open) -> None:
        self._names.remove(opened.name)
        self._calls.end(opened.call)

    def _tell(self, told: Told) -> None:
        self._outbox.append(told)
        self._wake.set()
