"""Scoring processes and the queue before them.

| loop            | consumes       | produces            | waits for                            |
| `_worker_loop`  | waiting scores | verdicts, failures  | a score; its worker, up to a limit   |

Each loop owns one worker at a time: a worker that takes too long, dies or says nonsense is ended and replaced, and the
score it had fails. Scores whose caller has gone are skipped. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from longshore.config import VerifierSpec
from longshore.errors import LongshoreError, PluginError, Rejected, Unavailable
from longshore.tasks.verification import ScoreRequest
from longshore.types import Verdict
from longshore.verifier import lines
from longshore.verifier.subprocess_worker import SubprocessWorker, WorkerDied

log = structlog.get_logger()

MAX_START_FAILURES = 3
_RESTART_PAUSE_S = 0.5


class ScoreTimeout(LongshoreError):
    """A score ran past its limit, and its worker was ended."""


class ScoreFailed(LongshoreError):
    """The verifier raised, or its process died."""


@dataclass(frozen=True)
class PoolLimits:
    """Bounds of a pool: workers, waiting scores, bytes of a worker's memory, seconds of its start."""

    workers: int
    max_waiting: int
    memory_bytes: int
    start_s: float


class VerifierPool:
    """N workers of one verifier. Use: `async with VerifierPool(...) as pool: await pool.score(request)`."""

    def __init__(self, spec: VerifierSpec, limits: PoolLimits, on_restart: Callable[[], None] = lambda: None) -> None:
        self._spec = spec
        self._limits = limits
        self._on_restart = on_restart
        self._waiting: asyncio.Queue[tuple[bytes, asyncio.Future[Verdict]]] = asyncio.Queue(limits.max_waiting)
        self._loops: list[asyncio.Task[None]] = []
        # Set once a worker has loaded the verifier.
        self.ready = asyncio.Event()

    async def __aenter__(self) -> VerifierPool:
        self._loops = [
            asyncio.create_task(self._worker_loop(), name=f"worker-{index}") for index in range(self._limits.workers)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        while not self._waiting.empty():
            self._waiting.get_nowait()[1].cancel()

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set. Raises PluginError when the verifier cannot be loaded."""
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([stopped, *self._loops], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()
        finally:
            stopped.cancel()

    @property
    def num_waiting(self) -> int:
        """Scores that no worker has taken yet."""
        return self._waiting.qsize()

    async def score(self, request: ScoreRequest) -> Verdict:
        """Waits for a worker and its verdict.

        Raises:
            Rejected: the request is too large, or the reward is not finite.
            ScoreTimeout: the verifier's `timeout_s` passed.
            ScoreFailed: the verifier raised or died.
            Unavailable: too many scores are waiting.
        """
        line = lines.dumps(lines.request_to_json(request))
        if len(line) > lines.MAX_LINE_BYTES:
            raise Rejected("oversized", f"the conversation has more than {lines.MAX_LINE_BYTES} bytes")
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((line, future))
        except asyncio.QueueFull:
            raise Unavailable(f"{self._limits.max_waiting} scores are waiting already") from None
        return await future

    async def _worker_loop(self) -> None:
        failures = 0
        while True:
            worker = SubprocessWorker(self._limits.memory_bytes)
            try:
                verifier = await self._load(worker)
                failures = 0
                self.ready.set()
                await self._serve(worker, verifier)
            except (WorkerDied, TimeoutError) as error:
                failures += 1
                log.warning("a worker did not start", failures=failures, reason=str(error))
                if failures >= MAX_START_FAILURES:
                    raise PluginError(f"verifier {self._spec.name!r} did not start {failures} times: {error}") from None
                await asyncio.sleep(_RESTART_PAUSE_S)
            finally:
                await worker.end()
            self._on_restart()

    async def _load(self, worker: SubprocessWorker) -> str:
        """Starts a worker and returns its verifier's name@version."""
        async with asyncio.timeout(self._limits.start_s):
            await worker.start()
            answer = await worker.ask(lines.dumps({"name": self._spec.name, "options": self._spec.options}))
        if "error" in answer:
            raise PluginError(str(answer["error"]))
        return str(answer["verifier"])

    async def _serve(self, worker: SubprocessWorker, verifier: str) -> None:
        """Scores until the worker must be replaced."""
        while True:
            line, future = await self._waiting.get()
            if future.done():
                continue
            try:
                async with asyncio.timeout(self._spec.timeout_s):
                    answer = await worker.ask(line)
                _settle(future, _verdict(answer, verifier))
            except TimeoutError:
                _settle(future, ScoreTimeout(f"{verifier} took longer than {self._spec.timeout_s:g} s"))
                return
            except WorkerDied as error:
                _settle(future, ScoreFailed(f"{verifier}: {error}"))
                return
            except asyncio.CancelledError:
                future.cancel()
                raise


def _verdict(answer: dict[str, Any], verifier: str) -> Verdict | LongshoreError:
    if answer.get("kind") == "Rejected":
        return Rejected("verifier", f"{verifier}: {answer.get('error')}")
    if "error" in answer:
        return ScoreFailed(f"{verifier}: {answer['error']}")
    try:
        return lines.verdict_from_json(answer["verdict"], verifier)
    except Rejected as error:
        return error


def _settle(future: asyncio.Future[Verdict], outcome: Verdict | LongshoreError) -> None:
    if future.done():
        # The caller has gone; its score is of no use to anyone.
        return
    if isinstance(outcome, Verdict):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
