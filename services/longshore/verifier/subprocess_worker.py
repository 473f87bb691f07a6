"""The pool's end of one scoring process: start, one question at a time, end for certain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Any

from longshore.errors import LongshoreError
from longshore.verifier.folders import WorkFolder
from longshore.verifier.lines import MAX_LINE_BYTES

_PASSED_ON = ("PATH", "PYTHONPATH")
_CLOSE_S = 1.0


class WorkerDied(LongshoreError):
    """The process ended, or answered with something that is no answer."""


class SubprocessWorker:
    """One process in an empty folder, with an almost empty environment and a process group of its own."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._folder: WorkFolder | None = None

    async def start(self) -> None:
        """Starts the process; it says nothing until asked."""
        self._folder = WorkFolder()
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        arguments = ("-m", "longshore.verifier.worker", str(self._memory_bytes), str(os.getpid()))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._folder.path,
            # One thread a worker: scorers that use numpy would otherwise take every core.
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(self._folder.path)},
            limit=MAX_LINE_BYTES,
            start_new_session=True,
        )

    async def ask(self, line: bytes) -> dict[str, Any]:
        """Sends a line and waits for the answer; the caller sets the deadline. After a failure, call `end`.

        Raises:
            WorkerDied: the process ended or its answer is malformed.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            await self._process.stdin.drain()
            answer = json.loads(await self._process.stdout.readuntil(b"\n"))
        except (OSError, asyncio.IncompleteReadError):
            raise WorkerDied(f"the scoring process ended with {await self._exit_code()}") from None
        except (asyncio.LimitOverrunError, ValueError):
            raise WorkerDied("the scoring process answered with something that is no answer") from None
        if not isinstance(answer, dict):
            raise WorkerDied("the scoring process answered with something that is no answer")
        return answer

    async def _exit_code(self) -> str:
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                code = await self._process.wait()
                return f"signal {-code}" if code < 0 else f"exit code {code}"
        return "its output closed"

    async def end(self) -> None:
        """Kills the process and whatever it started, and removes its folder."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            await self._close_pipes(self._process)
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    async def _close_pipes(self, process: asyncio.subprocess.Process) -> None:
        """Sees both pipes end, so that nothing is left to an event loop that may be closing."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        # A process that left the group may hold them open; it is not waited for.
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_S):
                while await process.stdout.read(MAX_LINE_BYTES):
                    pass
                await process.stdin.wait_closed()
