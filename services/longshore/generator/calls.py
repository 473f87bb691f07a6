"""Calls in progress: what is asked of the engine, by gRPC or by HTTP, and what it has said of each.

Lives on the event loop; the engine's events come to it from the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from prometheus_client import Counter

from longshore.errors import NotFound, Unavailable
from longshore.generator import metrics
from longshore.generator.engine import Engine, EngineEvent, EngineRequest, RequestFailed
from longshore.types import FinishReason, JobRef


class Call:
    """One request in the engine; whoever opened it gets its events through `put`, the last one included."""

    def __init__(self, engine: Engine, request_id: str, put: Callable[[EngineEvent], None]) -> None:
        self.request_id = request_id
        # How it ended; a word of a small set.
        self.outcome = "aborted"
        # Whether the engine has said its last, or nothing more is wanted of it.
        self.is_over = False
        self._engine = engine
        self._put = put

    def take(self, event: EngineEvent) -> None:
        if self.is_over:
            return
        if isinstance(event, RequestFailed):
            self.outcome, self.is_over = event.failure.value, True
        elif event.finish is not None:
            self.outcome, self.is_over = event.finish.value, True
        self._put(event)

    def stop(self) -> None:
        """Nothing more is wanted: the reply has ended as it should, though the engine does not know it."""
        self.outcome = FinishReason.STOP.value
        self.abort()

    def abort(self) -> None:
        """No further event comes."""
        self.is_over = True
        self._engine.abort(self.request_id)


class HeldCall:
    """A request whose events are kept until they are asked for."""

    def __init__(self, call: Call, events: asyncio.Queue[EngineEvent]) -> None:
        self._call = call
        self._events = events
        self.stop = call.stop

    async def next(self) -> EngineEvent:
        """The next event. The last one has `finish` or is a RequestFailed; it comes by the request's deadline."""
        return await self._events.get()


class Calls:
    """All calls on the process's one engine."""

    def __init__(self, job: JobRef) -> None:
        # None until the first version is proven.
        self.engine: Engine | None = None
        # Makes a version resident; None: only what the engine follows is served.
        self.keep: Callable[[int], Awaitable[None]] | None = None
        self._labels = (job.project, job.job)
        self._loop = asyncio.get_running_loop()
        # A caller's id may come again while the engine still ends the request before it: the engine gets our own ids.
        self._serials = itertools.count()
        self._open: dict[str, Call] = {}
        self._outcomes: dict[str, Counter] = {}

    def deliver(self, events: Sequence[EngineEvent]) -> None:
        """Takes the engine's events, on the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            call = self._open.get(event.request_id)
            if call is not None:
                call.take(event)

    def proven(self) -> Engine:
        """The engine. Raises Unavailable while no version has been proven."""
        if self.engine is None:
            raise Unavailable("no policy version has been proven yet")
        return self.engine

    def new_id(self) -> str:
        """An id for the engine that no other request has."""
        return str(next(self._serials))

    def begin(self, request: EngineRequest, put: Callable[[EngineEvent], None]) -> Call:
        """Submits a request; to be followed by `end`.

        Args:
            put: gets its events, on the event loop.

        Raises:
            Rejected, QueueFull, Unavailable: see Engine.submit.
        """
        engine = self.proven()
        call = Call(engine, request.request_id, put)
        # Before the submission: the engine's thread may be quick.
        self._open[request.request_id] = call
        try:
            engine.submit(request)
        except BaseException:
            del self._open[request.request_id]
            raise
        return call

    def end(self, call: Call) -> None:
        """Aborts a request that has not ended."""
        if not call.is_over:
            call.abort()
        del self._open[call.request_id]
        outcome = self._outcomes.get(call.outcome)
        if outcome is None:
            outcome = self._outcomes[call.outcome] = metrics.REPLIES.labels(*self._labels, call.outcome)
        outcome.inc()

    @contextlib.contextmanager
    def open(self, request: EngineRequest) -> Iterator[HeldCall]:
        """As `begin`; ends the request at the end of the block."""
        # Bounded by the tokens of one reply.
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        call = self.begin(request, events.put_nowait)
        try:
            yield HeldCall(call, events)
        finally:
            self.end(call)

    def is_resident(self, request: EngineRequest) -> bool:
        """Whether nothing has to be brought for a request."""
        pinned = request.version.min_version
        if pinned is None or pinned != request.version.max_version or self.keep is None:
            return True
        status = self.proven().status()
        return status.version is None or pinned in (status.version, *status.beside)

    async def have_resident(self, request: EngineRequest) -> None:
        """Brings the version that a request is pinned to, if it is none of those in memory.

        One above the served version that cannot be brought may be still to come: the engine waits for it. Raises
        NotFound, IntegrityError, Unavailable.
        """
        pinned = request.version.min_version
        if self.is_resident(request) or pinned is None or self.keep is None:
            return
        served = self.proven().status().version
        try:
            async with asyncio.timeout(request.deadline - time.monotonic()):
                await self.keep(pinned)
        except (NotFound, Unavailable):
            if served is None or pinned < served:
                raise
        except TimeoutError:
            raise Unavailable(f"version {pinned} could not be brought within the request's deadline") from None
