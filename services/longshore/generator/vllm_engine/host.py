"""A thread with an event loop, on which one VllmProcess lives."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from longshore.errors import ConfigError
from longshore.generator.vllm_engine.options import VllmOptions

if TYPE_CHECKING:
    from longshore.generator.vllm_engine.process import VllmProcess

CLOSE_S = 30.0
# What vllm reads when it is imported, unless a person has said otherwise: it reports home, writes much, forks a process
# that has threads, binds its threads to cores that others use, and asks a hub for models.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


class VllmHost:
    """Starts vLLM for a model and ends it; `process` may be used on `loop` alone."""

    process: VllmProcess

    def __init__(self, config: bytes, options: VllmOptions) -> None:
        """
        Args:
            config: the model's config.json.

        Raises:
            ConfigError: vLLM is not installed here, or cannot run the model.
        """
        self.loop = asyncio.new_event_loop()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(config, options), name="vllm", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except ConfigError:
            self._thread.join(CLOSE_S)
            raise

    def close(self) -> None:
        """Ends vLLM's processes and the thread. Not on the loop's own thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CLOSE_S)

    def _run(self, config: bytes, options: VllmOptions) -> None:
        asyncio.set_event_loop(self.loop)
        # vLLM reads a model's shape from a folder.
        with tempfile.TemporaryDirectory(prefix="longshore-model-") as folder:
            (Path(folder) / "config.json").write_bytes(config)
            try:
                self.loop.run_until_complete(self._start(folder, options))
            except BaseException as error:  # noqa: BLE001 - a thread's end: who waits for the start is told
                self._started.set_exception(error)
                return
            self._started.set_result(None)
            try:
                self.loop.run_forever()
            finally:
                self.process.close()
                self.loop.run_until_complete(self._cancel_all())
                self.loop.close()

    async def _start(self, folder: str, options: VllmOptions) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from longshore.generator.vllm_engine.process import VllmProcess
        except ImportError as error:
            raise ConfigError(f"the job wants engine vllm, which is not installed here ({error}): make vllm") from None
        self.process = VllmProcess(folder, options)
        await self.process.prepare()

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
