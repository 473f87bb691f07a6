"""Tells the watchers of a pointer when it moves, and when a version for it is on its way in.

Lives on one event loop; holds a pointer only while it is watched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.incoming import Incoming
from longshore.weight_store.version import PointerState

# Where a pointer stands; None while it does not exist.
State = tuple[PointerState, weights_pb2.SignedPointer] | None


class _Topic:
    def __init__(self) -> None:
        self.state: State = None
        # The publish that is under way and will move the pointer; the newest of several.
        self.incoming: Incoming | None = None
        self.moved = asyncio.Event()
        self.watchers = 0


class PointerHub:
    """Any number of watchers a pointer. A slow one gets the newest state, so nothing queues up."""

    def __init__(self) -> None:
        self._topics: dict[tuple[JobRef, str], _Topic] = {}
        self._closed = False

    def move(self, state: PointerState, signed: weights_pb2.SignedPointer) -> None:
        """Says where a pointer stands now. Calls may come out of order: a serial that does not grow is old news."""
        topic = self._topics.get((state.job, state.name))
        if topic is not None and _serial(topic.state) < state.serial:
            topic.state = (state, signed)
            self._wake(topic)

    def announce(self, job: JobRef, name: str, incoming: Incoming) -> None:
        """Says that a publish has begun whose version the pointer will name."""
        topic = self._topics.get((job, name))
        if topic is not None:
            topic.incoming = incoming
            self._wake(topic)

    def retire(self, job: JobRef, name: str, incoming: Incoming) -> None:
        """Says that a publish has ended; another one may be under way."""
        topic = self._topics.get((job, name))
        if topic is not None and topic.incoming is incoming:
            topic.incoming = None

    async def watch(
        self, job: JobRef, name: str, read: Callable[[], Awaitable[State]]
    ) -> AsyncGenerator[State | Incoming, None]:
        """Yields the present state, None if there is none, and then each newer one; ends when the hub closes.

        Between them come publishes that have begun, each before the state that names its version, if it is seen at all.

        Args:
            read: reads the pointer from the store.
        """
        topic = self._topics.setdefault((job, name), _Topic())
        topic.watchers += 1
        try:
            # Read after the topic is joined: a move in between is seen twice rather than never.
            state = await read()
            yield state
            seen: Incoming | None = None
            while not self._closed:
                moved = topic.moved
                if topic.incoming is not None and topic.incoming is not seen:
                    seen = topic.incoming
                    yield seen
                elif topic.state is not None and _serial(topic.state) > _serial(state):
                    state = topic.state
                    yield state
                else:
                    await moved.wait()
        finally:
            topic.watchers -= 1
            if not topic.watchers:
                self._topics.pop((job, name), None)

    def close(self) -> None:
        """Ends every watch."""
        self._closed = True
        for topic in self._topics.values():
            self._wake(topic)

    def _wake(self, topic: _Topic) -> None:
        moved, topic.moved = topic.moved, asyncio.Event()
        moved.set()


def _serial(state: State) -> int:
    return state[0].serial if state else -1
