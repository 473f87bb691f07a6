"""The engine over vLLM: who is answered by which version, updates in place, and their proof. Knows no vllm itself.

Everything but `_live`, `_staged` and `_closing` belongs to the host's event loop. vLLM has room for one set of weights,
so a version can be proven only once it is loaded. An update therefore goes

    pause (requests held between two decode steps) -> load -> resume, with the canary before all else
        proven:     what was drawn meanwhile goes out, under the new version
        not proven: pause -> load the version before -> prove that -> draw anew what was drawn meanwhile

and no token leaves the engine that was drawn by weights which are not proven yet.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from torch import Tensor

from longshore.errors import IntegrityError, Rejected, Unavailable
from longshore.generator.canary import Proof
from longshore.generator.engine import (
    Emit,
    EngineEvent,
    EngineLimits,
    EngineRequest,
    EngineStatus,
    Failure,
    QueueFull,
    RequestFailed,
    check_request,
)
from longshore.generator.metrics import EngineMetrics
from longshore.generator.reply import Reply
from longshore.generator.scheduler import Scheduler
from longshore.generator.vllm_engine.host import CLOSE_S, VllmHost
from longshore.generator.vllm_engine.loading import Loads, Staged, Version, check_like, make_ready
from longshore.generator.vllm_engine.options import MAX_TEMPERATURE, MIN_TEMPERATURE, VllmOptions
from longshore.generator.vllm_engine.segment import Segment
from longshore.types import EngineFingerprint

if TYPE_CHECKING:
    from longshore.generator.vllm_engine.process import Draw, Part

# Deadlines are kept to within this, in seconds; a death of vLLM's processes is seen within it.
SWEEP_S = 0.05
# Longest that an update may take; vLLM's workers read from memory.
UPDATE_S = 600.0

log = structlog.get_logger()


@dataclass
class _Run:
    """A reply that is being drawn."""

    reply: Reply
    draw: Draw
    task: asyncio.Task[None]
    # Proven ones.
    tokens: list[int] = field(default_factory=list)
    # Token, log-prob: drawn by a load that is not proven yet.
    held: list[tuple[int, float]] = field(default_factory=list)


class VllmEngine:
    """See engine.Engine. Versions are resident one at a time."""

    def __init__(self, host: VllmHost, config: bytes, options: VllmOptions, emit: Emit, metrics: EngineMetrics) -> None:
        process = host.process
        digest = hashlib.sha256(config).hexdigest()[:12]
        self.limits = EngineLimits(process.vocab_size, process.context, options.slots, options.max_waiting)
        self.fingerprint = EngineFingerprint("vllm", process.version, options.dtype, f"{process.device}-{digest}")
        self.ended: Future[None] = Future()
        self._host = host
        self._loop = host.loop
        self._process = process
        self._options = options
        self._emit = emit
        self._metrics = metrics
        self._scheduler = Scheduler(options.slots, process.context, drain=options.drain, recompute=options.recompute)
        self._loads = Loads(process, metrics, options)
        self._runs: dict[int, _Run] = {}
        self._resident: Version | None = None
        # Names one load of weights: what draws, and whose prefixes may be shared.
        self._label = ""
        self._staged: Staged | None = None
        self._next: tuple[Staged, Future[None]] | None = None
        self._updating: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._live: set[str] = set()
        self._closing = False
        self._events: list[EngineEvent] = []
        self._reporting = False
        self._status = EngineStatus(None, 0, 0, 0.0)
        self._sweeper: asyncio.Task[None] | None = None
        self._post(self._begin)

    # -- called on any thread

    def submit(self, request: EngineRequest) -> None:
        check_request(request, self.limits)
        temperature = request.sampling.temperature
        if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            allowed = f"{MIN_TEMPERATURE}..{MAX_TEMPERATURE} with engine vllm"
            raise Rejected("sampling", f"temperature must lie in {allowed}, got {temperature}")
        with self._lock:
            if self._closing:
                raise Unavailable("the engine has been closed")
            if request.request_id in self._live:
                raise ValueError(f"request id {request.request_id!r} is in use")
            if len(self._live) >= self.limits.slots + self.limits.max_waiting:
                raise QueueFull(f"{self.limits.max_waiting} requests wait already")
            self._live.add(request.request_id)
        self._post(self._add, request)

    def abort(self, request_id: str) -> None:
        self._post(self._drop, request_id)

    def stage(self, version: int, tensors: Mapping[str, Tensor], proof: Proof) -> None:
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.segment.close()
        base = self._resident
        proof.check(self.limits.vocab_size)
        check_like(tensors, base.tensors if base else None)
        self._staged = make_ready(Version(version, tensors, proof), base)

    def swap(self) -> Future[None]:
        assert self._staged is not None, "stage a version first"
        staged, self._staged = self._staged, None
        done: Future[None] = Future()
        with self._lock:
            if self._closing:
                raise Unavailable("the engine has been closed")
        self._post(self._begin_swap, staged, done)
        return done

    def keep(self) -> Future[None]:
        assert self._staged is not None, "stage a version first"
        staged, self._staged = self._staged, None
        staged.segment.close()
        raise Unavailable(f"no room for version {staged.version.version}: vLLM holds one version at a time")

    def status(self) -> EngineStatus:
        return self._status

    def close(self) -> None:
        with self._lock:
            closed, self._closing = self._closing, True
        if not closed and not self.ended.done():
            asyncio.run_coroutine_threadsafe(self._end(None), self._loop).result(CLOSE_S)
        self._host.close()

    def _post(self, act: Callable[..., None], *args: Any) -> None:
        self._loop.call_soon_threadsafe(self._guarded, act, *args)

    # -- the loop

    def _guarded(self, act: Callable[..., None], *args: Any) -> None:
        """Whatever fails here ends the engine, for all to see."""
        if self.ended.done():
            return
        try:
            act(*args)
        except Exception as error:  # noqa: BLE001 - `ended` carries it to whoever ends the process
            self._spawn(self._end(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._loop.create_task(self._survive(work))

    async def _survive(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - as in _guarded
            if not self.ended.done():
                await self._end(error)

    def _begin(self) -> None:
        self._sweeper = self._spawn(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._process.check_alive()
            failures, slots = self._scheduler.expire(time.monotonic())
            self._events += failures
            for slot in slots:
                self._forget(self._runs.pop(slot))
            if failures:
                self._turn()

    def _add(self, request: EngineRequest) -> None:
        failure = self._scheduler.add_in_time(request, time.monotonic())
        if failure is not None:
            self._events.append(failure)
        self._turn()

    def _drop(self, request_id: str) -> None:
        slot = self._scheduler.drop(request_id)
        if slot is not None:
            self._forget(self._runs.pop(slot))
        with self._lock:
            self._live.discard(request_id)
        self._turn()

    def _forget(self, run: _Run) -> None:
        run.task.cancel()
        self._spawn(run.draw.end())

    def _turn(self) -> None:
        """After anything that may let a swap begin or a request in."""
        if self._updating is None and self._next is not None and not self._scheduler.swap_is_held:
            self._updating = self._spawn(self._update(*self._next))
        if self._updating is None:
            for reply in self._scheduler.admit():
                self._runs[reply.slot] = self._start(reply, [])
        self._report_soon()

    def _start(self, reply: Reply, tokens: list[int]) -> _Run:
        request = reply.request
        draw = self._process.draw(
            request.request_id, (*request.token_ids, *tokens), request.sampling, reply.left, salt=self._label
        )
        run = _Run(reply, draw, None, tokens)  # type: ignore[arg-type] # set at once
        run.task = self._spawn(self._read(run))
        return run

    async def _read(self, run: _Run) -> None:
        try:
            async for part in run.draw.parts():
                self._take(run, part)
        except Rejected as error:
            request_id = run.reply.request.request_id
            self._events.append(RequestFailed(request_id, Failure.REFUSED, str(error)))
            self._drop(request_id)

    def _take(self, run: _Run, part: Part) -> None:
        now = time.monotonic()
        for token, logprob, label in zip(part.token_ids, part.logprobs, part.labels, strict=True):
            if label == self._label:
                self._drawn(run, token, logprob, now)
            else:
                run.held.append((token, logprob))
        self._metrics.tokens.inc(len(part.token_ids))
        if part.finished:
            self._turn()
        else:
            self._report_soon()

    def _drawn(self, run: _Run, token: int, logprob: float, now: float) -> None:
        run.tokens.append(token)
        event = self._scheduler.drawn(run.reply.slot, token, logprob, now)
        if event is not None:
            self._events.append(event)
            if event.finish is not None:
                del self._runs[run.reply.slot]

    # -- updates

    def _begin_swap(self, staged: Staged, done: Future[None]) -> None:
        assert self._next is None, "one swap at a time"
        self._next = (staged, done)
        self._scheduler.next_version = staged.version.version
        self._turn()

    async def _update(self, staged: Staged, done: Future[None]) -> None:
        """One swap, from its beginning to its end either way.

        Raises:
            Unavailable: vLLM has died, or did not get through it.
            IntegrityError: neither the new version nor the one before it could be proven.
        """
        refused: IntegrityError | None = None
        try:
            async with asyncio.timeout(UPDATE_S):
                try:
                    await self._go_to(staged)
                except IntegrityError as error:
                    refused = error
                    await self._go_back(staged.version.version, error)
        except TimeoutError:
            raise Unavailable(f"vLLM did not get through an update within {UPDATE_S:.0f} s") from None
        self._next = None
        self._updating = None
        self._set_status()
        if refused is None:
            done.set_result(None)
        else:
            done.set_exception(refused)
        self._turn()

    async def _go_to(self, staged: Staged) -> None:
        """Raises IntegrityError: the version cannot be loaded, or is not what it says."""
        if staged.base is not self._resident:
            staged.segment.close()
            staged = await asyncio.to_thread(make_ready, staged.version, self._resident)
        with staged.segment:
            label = await self._loads.load(staged.segment, staged.version.version)
        await self._loads.prove(staged.version)
        await self._adopt(staged.version, label)

    async def _adopt(self, version: Version, label: str) -> None:
        """What is loaded is proven: the held tokens are this version's."""
        # What the version before drew has to be told first.
        while any(run.draw.is_behind(label) for run in self._runs.values()):  # noqa: ASYNC110 - it is on its way
            await asyncio.sleep(0)
        events, failures, _ = self._scheduler.swapped()
        self._events += [*events, *failures]
        self._label = label
        self._resident = version
        self._metrics.version.set(version.version)
        now = time.monotonic()
        for run in list(self._runs.values()):
            held, run.held = run.held, []
            for token, logprob in held:
                self._drawn(run, token, logprob, now)

    async def _go_back(self, refused: int, reason: IntegrityError) -> None:
        """Puts the resident version's weights back, and draws anew what the refused ones drew.

        Raises:
            IntegrityError: those do not prove either.
        """
        self._scheduler.next_version = None
        log.warning(
            "version loaded and not proven", version=refused, back_to=self._scheduler.version, reason=str(reason)
        )
        resident = self._resident
        if resident is None:
            return
        await self._process.pause(forget=False)
        for run in self._runs.values():
            run.task.cancel()
        await asyncio.gather(*(run.draw.end() for run in self._runs.values()))
        # Nothing that the refused weights computed may be used again.
        await self._process.pause(forget=True)
        with await asyncio.to_thread(Segment, resident.tensors) as segment:
            self._label = await self._loads.load(segment, resident.version)
        await self._loads.prove(resident)
        for slot, run in list(self._runs.items()):
            event = run.reply.restarted()
            if event is not None:
                self._events.append(event)
            self._runs[slot] = self._start(run.reply, run.tokens)

    # -- what goes out

    def _report_soon(self) -> None:
        """One call for all events of one of vLLM's steps."""
        if not self._reporting:
            self._reporting = True
            self._loop.call_soon(self._guarded, self._report)

    def _report(self) -> None:
        self._reporting = False
        self._set_status()
        if not self._events:
            return
        events, self._events = self._events, []
        with self._lock:
            self._live.difference_update(
                event.request_id for event in events if isinstance(event, RequestFailed) or event.finish is not None
            )
        self._emit(events)

    def _set_status(self) -> None:
        # What vLLM itself holds back for want of cache decodes nothing: callers have sent more than there is room for.
        held = min(self._process.num_waiting, self._scheduler.num_running)
        running, waiting = self._scheduler.num_running - held, self._scheduler.num_waiting + held
        self._metrics.running.set(running)
        self._metrics.waiting.set(waiting)
        self._status = EngineStatus(self._scheduler.version, running, waiting, self._process.kv_used_ratio)

    async def _end(self, error: BaseException | None) -> None:
        """Ends the engine; what runs gets no further event."""
        if self.ended.done():
            return
        with self._lock:
            self._closing = True
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
        if self._next is not None and not self._next[1].done():
            self._next[1].set_exception(Unavailable("the engine ended before the swap"))
        ending = [run.draw.end() for run in self._runs.values()]
        for task in (self._sweeper, self._updating, *(run.task for run in self._runs.values())):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._runs.clear()
        if error is None:
            await asyncio.wait_for(asyncio.gather(*ending, return_exceptions=True), CLOSE_S)


def make_engine(config: bytes, options: VllmOptions, emit: Emit, metrics: EngineMetrics) -> VllmEngine:
    """Starts vLLM for a model's config.json; takes most of a minute. Raises ConfigError."""
    return VllmEngine(VllmHost(config, options), config, options, emit, metrics)
