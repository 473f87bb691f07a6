"""Environments as the actor runs them: the built-in one in place, plug-ins in threads with a deadline.

A plug-in that blocks must not hold up the other rollouts, nor the renewal of their leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from longshore.actor.episode import AttemptFailed, Surroundings
from longshore.tasks.environment import Environment, Observation, SingleTurn
from longshore.types import Message, Task

T = TypeVar("T")

MAX_THREADS = 32


class Direct:
    """An environment that never blocks, called in place."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def start(self, task: Task) -> list[Message]:
        return self._environment.start(task)

    async def step(self, reply: str) -> Observation:
        return self._environment.step(reply)


class Threaded:
    """A plug-in environment; made, started and stepped in threads of a bounded pool."""

    def __init__(self, make: Callable[[], Environment], threads: ThreadPoolExecutor, timeout_s: float) -> None:
        self._make = make
        self._threads = threads
        self._timeout_s = timeout_s

    async def start(self, task: Task) -> list[Message]:
        self._environment = await self._call(self._make)
        return list(await self._call(self._environment.start, task))

    async def step(self, reply: str) -> Observation:
        return await self._call(self._environment.step, reply)

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._threads, function, *args)
        except TimeoutError:
            raise AttemptFailed("environment", f"it took longer than {self._timeout_s:g} s") from None
        except Exception as error:
            raise AttemptFailed("environment", repr(error)) from error


class EnvironmentFactory:
    """Makes one rollout's surroundings at a time."""

    def __init__(self, kind: type[Any], options: dict[str, object], timeout_s: float) -> None:
        self._kind = kind
        self._options = options
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="environment")

    def __call__(self) -> Surroundings:
        if self._kind is SingleTurn:
            return Direct(SingleTurn(self._options))
        return Threaded(lambda: self._kind(dict(self._options)), self._threads, self._timeout_s)

    def close(self) -> None:
        """Does not wait for environments that hang: their threads end with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
