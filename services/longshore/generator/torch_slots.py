"""The engine for small models of the Llama family: a paged decoder, a scheduler, and the thread that turns them.

Each turn of the loop: take what came in, end what is late, swap if nothing holds the swap, prefill the admitted, draw
one token for every slot, and emit the events of all that in one call. Everything but `_inbox`, `_live` and the
staged weights belongs to the thread.

Requests are admitted while there are pages for their prompts; nothing is reserved for what they will draw. When the
pages run out under them, the one admitted last is *parked*: it keeps its slot, gives its pages back, and is computed
again, tokens drawn and all, when there are pages, before anybody new is admitted. A swap that recomputes caches parks
everyone: then the new weights compute them, some of them between two decode steps, as prompts are.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

import longshore
from longshore.errors import ConfigError, Unavailable
from longshore.generator import llama_forward, scheduler
from longshore.generator.attention import native
from longshore.generator.attention.cache import page_bytes
from longshore.generator.canary import Proof
from longshore.generator.engine import (
    Emit,
    EngineEvent,
    EngineLimits,
    EngineRequest,
    EngineStatus,
    QueueFull,
    RequestFailed,
    check_request,
)
from longshore.generator.llama_config import LlamaShape
from longshore.generator.llama_weights import LlamaWeights, build_weights
from longshore.generator.metrics import EngineMetrics
from longshore.generator.paged_decoder import PagedDecoder
from longshore.generator.pages import PAGE
from longshore.generator.reply import Reply
from longshore.generator.scheduler import Scheduler
from longshore.types import EngineFingerprint

# Deadlines are kept to within this, in seconds.
SWEEP_S = 0.05
# How long an idle engine sleeps at most; whatever comes in wakes it.
IDLE_S = 5.0
CLOSE_S = 60.0
MIN_CONTEXT = 8


@dataclass(frozen=True)
class SlotOptions:
    """How wide an engine is."""

    slots: int
    max_waiting: int
    # Most memory of the KV cache.
    cache_bytes: int
    seed: int
    # Versions that may be in memory at a time, the served one among them.
    residents: int = 1
    # What becomes of running requests at a swap: see Scheduler.
    drain: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class _Staged:
    version: int
    weights: LlamaWeights


class TorchSlotsEngine:
    """See engine.Engine. The context is the model's, or as much of it as there is room for in `cache_bytes`."""

    def __init__(self, shape: LlamaShape, options: SlotOptions, emit: Emit, metrics: EngineMetrics) -> None:
        """Starts the thread. Raises ConfigError when the cache is too small to decode in."""
        pages, context = _room(shape, options)
        self.shape = shape
        self.limits = EngineLimits(shape.vocab_size, context, options.slots, options.max_waiting, options.residents)
        self.fingerprint = EngineFingerprint("torch-slots", longshore.__version__, "float32", f"cpu-{shape.digest}")
        self.ended: Future[None] = Future()
        self._emit = emit
        self._metrics = metrics
        self._decoder = PagedDecoder(shape, options.slots, context, pages, options.seed, native.load())
        self._recompute = options.recompute
        self._scheduler = Scheduler(
            options.slots, context, options.residents, drain=options.drain, recompute=options.recompute
        )
        # Weights of the resident versions.
        self._weights: dict[int, LlamaWeights] = {}
        # Slots whose requests run and are not in the decoder; see above.
        self._parked: set[int] = set()
        self._served: LlamaWeights | None = None
        self._staged: _Staged | None = None
        self._next: _Staged | None = None
        self._swap_done: Future[None] = Future()
        self._swap_done.set_result(None)
        # Promises of `keep` that are still open.
        self._keeping: list[Future[None]] = []
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._live: set[str] = set()
        self._closing = False
        self._events: list[EngineEvent] = []
        self._next_sweep = 0.0
        self._status = EngineStatus(None, 0, 0, 0.0)
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # -- called on any thread

    def submit(self, request: EngineRequest) -> None:
        check_request(request, self.limits)
        with self._wake:
            if request.request_id in self._live:
                raise ValueError(f"request id {request.request_id!r} is in use")
            if len(self._live) >= self.limits.slots + self.limits.max_waiting:
                raise QueueFull(f"{self.limits.max_waiting} requests wait already")
            self._post(partial(self._add, request))
            self._live.add(request.request_id)

    def abort(self, request_id: str) -> None:
        with self._wake:
            if request_id in self._live and not self._closing:
                self._post(partial(self._drop, request_id))

    def stage(self, version: int, tensors: Mapping[str, torch.Tensor], proof: Proof) -> None:
        # Written by the thread: a snapshot will do.
        like = self._staged.weights if self._staged else self._served
        self._staged = None
        weights = build_weights(self.shape, tensors, like)
        proof.check(self.shape.vocab_size)
        self._metrics.prove(proof.gap(partial(llama_forward.score, self.shape, weights)), self.fingerprint.dtype)
        self._staged = _Staged(version, weights)

    def swap(self) -> Future[None]:
        assert self._staged is not None, "stage a version first"
        staged, self._staged = self._staged, None
        with self._wake:
            assert self._swap_done.done(), "one swap at a time"
            self._post(partial(self._begin_swap, staged))
            self._swap_done = Future()
            return self._swap_done

    def keep(self) -> Future[None]:
        assert self._staged is not None, "stage a version first"
        staged, self._staged = self._staged, None
        done: Future[None] = Future()
        with self._wake:
            self._post(partial(self._keep, staged, done))
            self._keeping = [*(open_ for open_ in self._keeping if not open_.done()), done]
        return done

    def status(self) -> EngineStatus:
        return self._status

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_S)

    def _post(self, act: Callable[[], None]) -> None:
        if self._closing:
            raise Unavailable("the engine has been closed")
        self._inbox.append(act)
        self._wake.notify()

    # -- the thread

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as caught:  # noqa: BLE001 - a thread's end: `ended` carries it to whoever ends the process
            error = caught
        self._decoder.close()
        with self._wake:
            self._closing = True
            self._inbox.clear()
            for promise in (self._swap_done, *self._keeping):
                if not promise.done():
                    promise.set_exception(Unavailable("the engine ended before the swap"))
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def _turn(self) -> bool:
        """One turn of the loop; False when the engine is to end."""
        acts = self._take()
        if acts is None:
            return False
        for act in acts:
            act()
        self._sweep()
        self._try_swap()
        self._prefill()
        if self._decoder.filled:
            self._decode()
        self._let_go()
        self._report()
        return True

    def _take(self) -> list[Callable[[], None]] | None:
        """What came in; sleeps for it while there is nothing to decode. None: closing."""
        with self._wake:
            # A swap whose last holder has just ended must not sleep until something comes in.
            if not (self._inbox or self._closing or self._scheduler.num_running or self._next):
                # Only waiting requests have deadlines to watch.
                self._wake.wait(SWEEP_S if self._scheduler.num_waiting else IDLE_S)
            if self._closing:
                return None
            acts = list(self._inbox)
            self._inbox.clear()
            return acts

    def _add(self, request: EngineRequest) -> None:
        failure = self._scheduler.add_in_time(request, time.monotonic())
        if failure is not None:
            self._events.append(failure)

    def _drop(self, request_id: str) -> None:
        slot = self._scheduler.drop(request_id)
        if slot is not None:
            self._release([slot])
        self._forget([request_id])

    def _sweep(self) -> None:
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_S
        failures, slots = self._scheduler.expire(now)
        self._events += failures
        self._release(slots)

    def _release(self, slots: Iterable[int]) -> None:
        held = set(slots)
        self._decoder.release(held - self._parked)
        self._parked -= held

    def _let_go(self) -> None:
        """Frees the versions that no request needs any more; before the loop may sleep."""
        with self._wake:
            # What has just come in may need one.
            gone = [] if self._inbox else self._scheduler.forget_unused()
        for version in gone:
            del self._weights[version]

    def _begin_swap(self, staged: _Staged) -> None:
        self._next = staged
        self._scheduler.next_version = staged.version

    def _try_swap(self) -> None:
        if self._next is None or self._scheduler.swap_is_held:
            return
        staged, self._next = self._next, None
        under_old = self._scheduler.slots_under(self._scheduler.version)
        events, failures, staying = self._scheduler.swapped()
        self._events += [*events, *failures]
        moving = under_old - set(staying) - self._parked
        self._weights[staged.version] = self._served = staged.weights
        if self._recompute:
            self._park(moving)
        else:
            self._decoder.move(moving, staged.weights)
        resident = {staged.version, *self._scheduler.beside}
        self._weights = {version: weights for version, weights in self._weights.items() if version in resident}
        self._metrics.version.set(staged.version)
        # Whoever waits for the swap may ask for the status at once.
        self._set_status()
        self._swap_done.set_result(None)

    def _keep(self, staged: _Staged, done: Future[None]) -> None:
        try:
            gone = self._scheduler.keep(staged.version)
        except Unavailable as error:
            done.set_exception(error)
            return
        if gone is not None:
            del self._weights[gone]
        if staged.version in self._scheduler.beside:
            self._weights[staged.version] = staged.weights
        self._set_status()
        done.set_result(None)

    def _park(self, slots: Iterable[int]) -> None:
        parked = set(slots)
        self._decoder.release(parked)
        self._parked |= parked

    def _prefill(self) -> None:
        with self._metrics.prefill_seconds.time() if self._parked else contextlib.nullcontext():
            self._unpark()
        # Who waits for pages has come before.
        admitted = [] if self._parked else self._scheduler.admit(self._reserve)
        if admitted:
            with self._metrics.prefill_seconds.time():
                self._decoder.prefill()

    def _unpark(self) -> None:
        """Computes parked requests again, those admitted first before others, as many as there is room for."""
        tokens = 0
        for slot in self._scheduler.slots_by_admission() if self._parked else ():
            if slot not in self._parked:
                continue
            reply = self._scheduler.reply(slot)
            tokens += len(reply.tokens)
            if (self._decoder.filled and tokens > scheduler.PREFILL_TOKENS) or not self._reserve(reply):
                break
            self._parked.remove(slot)
            event = reply.restarted()
            if event is not None:
                self._events.append(event)
        self._decoder.prefill()

    def _reserve(self, reply: Reply) -> bool:
        """Whether the decoder has taken a request that has its slot and version."""
        heat = reply.request.sampling.temperature
        return self._decoder.reserve(reply.slot, reply.tokens, heat, self._weights[reply.version])

    def _decode(self) -> None:
        while self._decoder.is_short():
            running = (slot for slot in reversed(self._scheduler.slots_by_admission()) if slot not in self._parked)
            self._park([next(running)])
            self._metrics.parked.inc()
        with self._metrics.decode_seconds.time():
            step = self._decoder.decode()
        now = time.monotonic()
        ended = []
        for slot, token, logprob in zip(step.slots, step.tokens, step.logprobs, strict=True):
            event = self._scheduler.drawn(slot, token, logprob, now)
            if event is not None:
                self._events.append(event)
                if event.finish is not None:
                    ended.append(slot)
        self._release(ended)
        self._metrics.tokens.inc(len(step.slots))

    def _report(self) -> None:
        """Emits the turn's events and brings the status up to date."""
        self._set_status()
        if not self._events:
            return
        events, self._events = self._events, []
        self._forget(
            event.request_id for event in events if isinstance(event, RequestFailed) or event.finish is not None
        )
        self._emit(events)

    def _set_status(self) -> None:
        # Who is parked holds a slot and decodes nothing: callers have sent more than there is room for.
        parked = len(self._parked)
        running, waiting = self._scheduler.num_running - parked, self._scheduler.num_waiting + parked
        self._metrics.running.set(running)
        self._metrics.waiting.set(waiting)
        used = self._decoder.pages.held / self._decoder.pages.count
        self._status = EngineStatus(self._scheduler.version, running, waiting, used, tuple(self._scheduler.beside))

    def _forget(self, request_ids: Iterable[str]) -> None:
        with self._wake:
            self._live.difference_update(request_ids)


def _room(shape: LlamaShape, options: SlotOptions) -> tuple[int, int]:
    """Pages of the cache, and the context: no longer than the pages hold, so that a request alone always has room."""
    fits = options.cache_bytes // page_bytes(shape)
    context = min(fits * PAGE, shape.max_position_embeddings)
    if context < min(MIN_CONTEXT, shape.max_position_embeddings):
        raise ConfigError(
            f"a KV cache of {options.cache_bytes} bytes has room for {fits * PAGE} tokens: raise LONGSHORE_CACHE_MB"
        )
    return min(fits, options.slots * -(-context // PAGE)), context
