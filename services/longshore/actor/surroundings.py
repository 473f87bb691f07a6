"""Environments as the actor runs them: the built-in one in place, plug-ins in threads with a deadline.

A plug-in that blocks must not hold up the other rollouts, nor the renewal of their leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from longshore.actor.episode import AttemptFailed, Surroundings
from longshore.tasks.environment import (
    MAX_SNAPSHOT_BYTES,
    Environment,
    Observation,
    Restoring,
    SingleTurn,
    restoring,
)
from longshore.types import Message, Task

T = TypeVar("T")

MAX_THREADS = 32


class Direct:
    """An environment that never blocks, called in place. It cannot be gone on with."""

    restoring = Restoring.NONE

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def start(self, task: Task) -> list[Message]:
        return self._environment.start(task)

    async def step(self, reply: str) -> Observation:
        return self._environment.step(reply)

    async def snapshot(self) -> bytes:
        raise AttemptFailed("environment", "it has no snapshots")

    async def restore(self, task: Task, snapshot: bytes) -> None:
        raise AttemptFailed("environment", "it has no snapshots")


class _Threads:
    """Runs functions in daemon threads, a bounded number at a time.

    Not an executor: the interpreter waits for an executor's threads at its end, and a plug-in may never return.
    """

    def __init__(self, limit: int) -> None:
        self._free = asyncio.Semaphore(limit)

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """What the function returns or raises. A caller that leaves does not end it; its thread stays counted."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()

        def settle(result: Callable[[], None]) -> None:
            self._free.release()
            if not outcome.done():
                result()

        def work() -> None:
            result: Callable[[], None]
            try:
                value = function(*args)
                result = lambda: outcome.set_result(value)  # noqa: E731
            except BaseException as error:  # noqa: BLE001 - even an exit of a plug-in must reach the one who waits
                failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
                result = lambda: outcome.set_exception(failure)  # noqa: E731
            # The loop may have ended while a plug-in hung.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result)

        threading.Thread(target=work, name="environment", daemon=True).start()
        return await outcome


class Threaded:
    """A plug-in environment; made, started and stepped in threads."""

    def __init__(
        self, make: Callable[[], Environment], threads: _Threads, timeout_s: float, restoring: Restoring
    ) -> None:
        self.restoring = restoring
        self._make = make
        self._threads = threads
        self._timeout_s = timeout_s

    async def start(self, task: Task) -> list[Message]:
        def begin() -> tuple[Environment, list[Message]]:
            environment = self._make()
            return environment, list(environment.start(task))

        self._environment, messages = await self._call(begin)
        return messages

    async def step(self, reply: str) -> Observation:
        observation = await self._call(self._environment.step, reply)
        if not isinstance(observation, Observation):
            raise AttemptFailed("environment", f"step gave a {type(observation).__name__}, not an Observation")
        return observation

    async def snapshot(self) -> bytes:
        """The state after the newest step. Raises AttemptFailed, also for one that is too large."""
        plugin: Any = self._environment
        snapshot = await self._call(plugin.snapshot)
        if not isinstance(snapshot, bytes) or len(snapshot) > MAX_SNAPSHOT_BYTES:
            raise AttemptFailed("environment", f"a snapshot must be at most {MAX_SNAPSHOT_BYTES} bytes")
        return snapshot

    async def restore(self, task: Task, snapshot: bytes) -> None:
        """In place of `start`. Raises AttemptFailed."""

        def begin() -> Environment:
            environment: Any = self._make()
            environment.restore(task, snapshot)
            restored: Environment = environment
            return restored

        self._environment = await self._call(begin)

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._threads.call(function, *args)
        except TimeoutError:
            raise AttemptFailed("environment", f"it took longer than {self._timeout_s:g} s") from None
        except Exception as error:
            # A plug-in may raise anything; it fails this attempt alone.
            raise AttemptFailed("environment", repr(error)) from error


class EnvironmentFactory:
    """Makes one rollout's surroundings at a time."""

    def __init__(self, kind: type[Any], options: dict[str, object], timeout_s: float) -> None:
        self._kind = kind
        self._options = options
        self._timeout_s = timeout_s
        self._threads = _Threads(MAX_THREADS)
        self._restoring = restoring(kind)

    def __call__(self) -> Surroundings:
        if self._kind is SingleTurn:
            return Direct(SingleTurn(self._options))
        return Threaded(lambda: self._kind(dict(self._options)), self._threads, self._timeout_s, self._restoring)
