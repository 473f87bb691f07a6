"""One vLLM for all tests of a session: its start takes most of a minute. Each test gets an engine of its own on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import psutil

from longshore.generator.engine import Emit
from longshore.generator.metrics import EngineMetrics
from longshore.generator.vllm_engine.engine import VllmEngine
from longshore.generator.vllm_engine.host import VllmHost
from longshore.generator.vllm_engine.options import VllmOptions
from longshore.types import JobRef

WIDEST = 256
CACHE_BYTES = 64 << 20
WAIT_S = 60.0


class SharedHost(VllmHost):
    """A host that engines leave as they found it."""

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._forget(), self.loop).result(WAIT_S)

    async def _forget(self) -> None:
        await self.process.pause(forget=True)
        await self.process.resume()

    def end(self) -> None:
        super().close()


_hosts: dict[bytes, SharedHost] = {}


def shared_host(config: bytes) -> SharedHost:
    if config not in _hosts:
        options = VllmOptions(WIDEST, 0, CACHE_BYTES, seed=7, worker_extension="vllm_worker.BreakableExtension")
        _hosts[config] = SharedHost(config, options)
    return _hosts[config]


def end() -> None:
    """Ends what the session started."""
    while _hosts:
        _hosts.popitem()[1].end()


def make(
    config: bytes, emit: Emit, slots: int, max_waiting: int, *, recompute: bool = False, drain: bool = False
) -> VllmEngine:
    options = VllmOptions(slots, max_waiting, CACHE_BYTES, seed=7, recompute=recompute, drain=drain)
    return VllmEngine(shared_host(config), config, options, emit, EngineMetrics(JobRef("default", "contract")))


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Stops vLLM's own processes: nothing is drawn meanwhile."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
