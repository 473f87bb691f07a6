"""Every engine, and a rig to drive one by hand. A new engine adds a maker to ENGINES and nothing else."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pytest
import torch
from _pytest.mark import ParameterSet
from tiny_llama import CONTEXT, canary_logprobs, config_json, named_tensors, reference_logprobs
from transformers import LlamaForCausalLM

from longshore.errors import LongshoreError
from longshore.generator.canary import Proof
from longshore.generator.engine import (
    Emit,
    Engine,
    EngineEvent,
    EngineRequest,
    QueueFull,
    RequestFailed,
    TokensDrawn,
)
from longshore.generator.llama_config import read_config
from longshore.generator.metrics import EngineMetrics
from longshore.generator.torch_slots import SlotOptions, TorchSlotsEngine
from longshore.types import FinishReason, JobRef, Sampling, VersionConstraint
from longshore.weights.client import CanaryProbe

WAIT_S = 60.0
SLOTS = 4
PROMPT = (3, 4, 5, 6)
CANARY = (1, 9, 8, 7, 30, 2, 2, 17)
# Longer than any test lets it become: such a request runs until it is aborted or the weights are swapped under it.
LONG = CONTEXT


@dataclass(frozen=True)
class Update:
    """What becomes of running requests at a swap; makers take it as `update`."""

    drain: bool = False
    recompute: bool = False


def _torch_slots(
    model: LlamaForCausalLM, emit: Emit, slots: int, max_waiting: int, residents: int, update: Update = Update()
) -> Engine:
    options = SlotOptions(
        slots=slots,
        max_waiting=max_waiting,
        cache_bytes=1 << 30,
        seed=1,
        residents=residents,
        drain=update.drain,
        recompute=update.recompute,
    )
    return TorchSlotsEngine(
        read_config(config_json(model)), options, emit, EngineMetrics(JobRef("default", "contract"))
    )


def _vllm(
    model: LlamaForCausalLM, emit: Emit, slots: int, max_waiting: int, residents: int, update: Update = Update()
) -> Engine:
    import vllm_rig

    return vllm_rig.make(config_json(model), emit, slots, max_waiting, drain=update.drain, recompute=update.recompute)


Maker = Callable[..., Engine]
# What is not marked vllm holds several versions at a time.
SEVERAL: dict[str, Maker] = {"torch-slots": _torch_slots}
ENGINES: dict[str, Maker] = {**SEVERAL, "vllm": _vllm}


def each(engines: Mapping[str, Maker]) -> list[ParameterSet]:
    """For pytest's parametrize: vLLM's tests run in its own environment (`make test-vllm`)."""
    return [pytest.param(name, marks=pytest.mark.vllm if name == "vllm" else ()) for name in engines]


@dataclass
class Outcome:
    """All that an engine said of one request."""

    events: list[TokensDrawn] = field(default_factory=list)
    failure: RequestFailed | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    @property
    def logprobs(self) -> torch.Tensor:
        return torch.tensor([value for event in self.events for value in event.logprobs])

    @property
    def finish(self) -> FinishReason | None:
        return self.events[-1].finish if self.events else None

    @property
    def ended(self) -> bool:
        return self.failure is not None or self.finish is not None


class Rig:
    """An engine and a place where its events are gathered; `on_events` sees them first, on the engine's thread."""

    def __init__(
        self,
        make: Callable[..., Engine],
        model: LlamaForCausalLM,
        slots: int = SLOTS,
        max_waiting: int = 8,
        residents: int = 1,
    ) -> None:
        self.on_events: Callable[[Sequence[EngineEvent]], None] = lambda events: None
        self._events: queue.Queue[EngineEvent] = queue.Queue()
        self.outcomes: dict[str, Outcome] = {}
        # Holds what draws, where that is not the engine's thread.
        self.frozen: AbstractContextManager[None] = contextlib.nullcontext()
        self.engine = make(model, self._emit, slots, max_waiting, residents)
        if self.engine.fingerprint.engine == "vllm":
            import vllm_rig

            self.frozen = vllm_rig.frozen()

    def _emit(self, events: Sequence[EngineEvent]) -> None:
        self.on_events(events)
        for event in events:
            self._events.put(event)

    def serve(self, model: LlamaForCausalLM, version: int) -> None:
        self.stage(model, version)
        self.engine.swap().result(WAIT_S)

    def keep(self, model: LlamaForCausalLM, version: int) -> None:
        self.stage(model, version)
        self.engine.keep().result(WAIT_S)

    def stage(self, model: LlamaForCausalLM, version: int) -> None:
        self.engine.stage(version, named_tensors(model), proof_of(model))

    def submit(
        self,
        name: str,
        prompt: Sequence[int] = PROMPT,
        *,
        tokens: int = 6,
        temperature: float = 1.0,
        stop: tuple[int, ...] = (),
        version: tuple[int | None, int | None] = (None, None),
        seconds: float = WAIT_S,
    ) -> None:
        request = EngineRequest(
            name,
            tuple(prompt),
            Sampling(temperature, tokens, stop),
            deadline=time.monotonic() + seconds,
            version=VersionConstraint(*version),
        )
        self.engine.submit(request)

    def take(self) -> None:
        """Waits for one more event."""
        event = self._events.get(timeout=WAIT_S)
        outcome = self.outcomes.setdefault(event.request_id, Outcome())
        assert not outcome.ended, f"an event after the last one: {event}"
        if isinstance(event, RequestFailed):
            outcome.failure = event
        else:
            assert len(event.token_ids) == len(event.logprobs) > 0
            outcome.events.append(event)

    def wait(self, *names: str) -> list[Outcome]:
        while not all(name in self.outcomes and self.outcomes[name].ended for name in names):
            self.take()
        return [self.outcomes[name] for name in names]

    def reply(self, name: str, *args: object, **options: object) -> Outcome:
        self.submit(name, *args, **options)  # type: ignore[arg-type]
        return self.wait(name)[0]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"never came: {self.engine.status()}"
            time.sleep(0.002)


def proof_of(model: LlamaForCausalLM, off_by: float = 0.0) -> Proof:
    """What the learner would have signed of these weights; `off_by` makes it wrong."""
    values = canary_logprobs(model, CANARY)
    return Proof((CanaryProbe(CANARY, (*values[:-1], values[-1] + off_by)),))


class PausedAtFirstEvent:
    """Holds the engine's thread inside its callback at the first event of a request: what is done meanwhile comes
    between two decode steps for certain."""

    def __init__(self, rig: Rig, name: str) -> None:
        self._seen: queue.Queue[None] = queue.Queue()
        self._go: queue.Queue[None] = queue.Queue()
        self._name = name
        self._rig = rig
        rig.on_events = self._on_events

    def _on_events(self, events: Sequence[EngineEvent]) -> None:
        if self._name and any(event.request_id == self._name for event in events):
            self._name = ""
            with self._rig.frozen:
                self._seen.put(None)
                self._go.get(timeout=WAIT_S)

    def __enter__(self) -> None:
        self._seen.get(timeout=WAIT_S)

    def __exit__(self, *error: object) -> None:
        self._go.put(None)


def assert_matches(outcome: Outcome, model: LlamaForCausalLM, prompt: Sequence[int], temperature: float = 1.0) -> None:
    expected = reference_logprobs(model, prompt, outcome.tokens, temperature)
    torch.testing.assert_close(outcome.logprobs, expected, atol=1e-4, rtol=0)


def carried_logprobs(
    old: LlamaForCausalLM, new: LlamaForCausalLM, prompt: Sequence[int], reply: list[int], drawn_before: int
) -> torch.Tensor:
    """Teacher forcing with a swap: the new weights read the keys and values that the old ones left, all but the
    pending token's."""
    sequence = [*prompt, *reply]
    switch = len(prompt) + drawn_before - 1
    with torch.no_grad():
        first = old(torch.tensor([sequence[:switch]]), use_cache=True)
        second = new(torch.tensor([sequence[switch:]]), past_key_values=first.past_key_values)
    logits = torch.cat((first.logits[0], second.logits[0]))[len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(reply).unsqueeze(1)).squeeze(1)


def takes_requests(rig: Rig) -> bool:
    """False once the engine has been told to close."""
    try:
        rig.submit(f"probe-{time.monotonic_ns()}", version=(9, None))
    except QueueFull:
        return True
    except LongshoreError:
        return False
    return True
