"""One side of the generation benchmark, a process: an engine by itself, or what transformers offers.

    python -m benchmarks.generation_sides SIDE MODEL THREADS JOB_FILE DTYPE

SIDE is `engine`, `batching`, or `generate-N`, of which N calls run at a time; each works with THREADS threads of
torch's. It answers each line with a line of JSON. `draw COUNT TOKENS`: so many replies asked for at once, the seconds
until all are there. An engine also takes `load STREAMS SECONDS TOKENS`, `first COUNT`, `swaps COUNT STREAMS` and
`gap COUNT TOKENS`; see Engine.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation_models import CANARY, config_of, learner_logprobs, load_model, prompts
from longshore.generator.canary import Proof
from longshore.generator.config import GeneratorSettings
from longshore.generator.engine import EngineEvent, EngineRequest, RequestFailed
from longshore.generator.making import make_engine
from longshore.settings import JobFile
from longshore.types import Sampling
from longshore.weights.client import CanaryProbe

WAIT_S = 300.0
WARM_STEPS = 10


class Engine:
    """A Longshore engine, made as the service makes it, driven on this thread without a service."""

    def __init__(self, model: Any, job_file: Path) -> None:
        job = JobFile.model_validate_json(job_file.read_text(encoding="utf-8"))
        settings = GeneratorSettings(job_file=job_file, weights="127.0.0.1:1", max_waiting=4096)
        self._model = model
        self._names = map(str, itertools.count())
        self._events: queue.Queue[EngineEvent] = queue.Queue()
        # When the engine told of tokens.
        self._told: list[float] = []
        self._engine = make_engine(settings, job, config_of(model), self._emit)
        self._version = 0
        self._stage()
        self._engine.swap().result(WAIT_S)

    def _emit(self, events: Sequence[EngineEvent]) -> None:
        self._told.append(time.perf_counter())
        for event in events:
            self._events.put(event)

    def _stage(self) -> None:
        self._version += 1
        probe = CanaryProbe(CANARY, tuple(learner_logprobs(self._model, CANARY)))
        tensors = {name: own.detach().clone() for name, own in self._model.named_parameters()}
        self._engine.stage(self._version, tensors, Proof((probe,)))

    def _submit(self, prompt: tuple[int, ...], tokens: int, watched: bool = False) -> str:
        name = next(self._names)
        deadline = time.monotonic() + WAIT_S
        self._engine.submit(EngineRequest(name, prompt, Sampling(1.0, tokens, ()), deadline, watched=watched))
        return name

    def _take(self) -> Any:
        event = self._events.get(timeout=WAIT_S)
        if isinstance(event, RequestFailed):
            raise RuntimeError(event.message)
        return event

    def draw(self, count: int, tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        for prompt in prompts(count):
            self._submit(prompt, tokens)
        ended = 0
        while ended < count:
            ended += self._take().finish is not None
        return {"tokens": count * tokens, "seconds": time.perf_counter() - started}

    def load(self, streams: int, seconds: float, tokens: int) -> dict[str, Any]:
        """Tokens that came within a time, with so many requests open throughout."""
        asked = itertools.cycle(prompts(streams))
        for _ in range(streams):
            self._submit(next(asked), tokens)
        count, ends = 0, time.perf_counter() + seconds
        while (now := time.perf_counter()) < ends:
            event = self._take()
            count += len(event.token_ids)
            if event.finish is not None:
                self._submit(next(asked), tokens)
        self._drain(streams)
        return {"tokens": count, "seconds": now - ends + seconds}

    def _drain(self, streams: int) -> None:
        while streams:
            streams -= self._take().finish is not None

    def first(self, count: int) -> dict[str, Any]:
        """From a request to its first token, with nothing else to do."""
        seconds = []
        for prompt in prompts(count):
            started = time.perf_counter()
            self._submit(prompt, 1)
            self._take()
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def swaps(self, count: int, streams: int) -> dict[str, Any]:
        """The time between two decode steps with a swap in it, and without one, while nothing is admitted."""
        pauses: list[float] = []
        for _ in range(count):
            # Staged before, so that no reply ends while that is done.
            self._stage()
            names = {self._submit(prompt, 200, watched=True) for prompt in prompts(streams)}
            for _ in range(WARM_STEPS * streams):
                self._take()
            self._told.clear()
            done: list[float] = []
            swapped = self._engine.swap()
            swapped.add_done_callback(lambda _, done=done: done.append(time.perf_counter()))  # type: ignore[misc]
            swapped.result(WAIT_S)
            for _ in range(WARM_STEPS * streams):
                self._take()
            told = list(self._told)
            after = next(number for number, at in enumerate(told) if at > done[0])
            gaps = [later - earlier for earlier, later in itertools.pairwise(told)]
            pauses.append((told[after] - told[after - 1]) / statistics.median(gaps[after + 1 :]))
            for name in names:
                self._engine.abort(name)
            while self._engine.status().running:
                time.sleep(0.01)
            with self._events.mutex:
                self._events.queue.clear()
        return {"steps": pauses}

    def gap(self, count: int, tokens: int) -> dict[str, Any]:
        """How far the log-probs of drawn tokens are from the learner's, in nats."""
        asked = {self._submit(prompt, tokens): prompt for prompt in prompts(count)}
        drawn: dict[str, list[int]] = collections.defaultdict(list)
        logprobs: dict[str, list[float]] = collections.defaultdict(list)
        left = count
        while left:
            event = self._take()
            drawn[event.request_id] += event.token_ids
            logprobs[event.request_id] += event.logprobs
            left -= event.finish is not None
        gaps = []
        for name, prompt in asked.items():
            theirs = learner_logprobs(self._model, (*prompt, *drawn[name]))[len(prompt) - 1 :]
            gaps += [abs(own - other) for own, other in zip(logprobs[name], theirs, strict=True)]
        return {"mean": statistics.fmean(gaps), "max": max(gaps), "dtype": self._engine.fingerprint.dtype}


class Generate:
    """transformers' `generate()`, a call a request, on so many threads."""

    def __init__(self, model: Any, calls: int) -> None:
        self._model = model
        self._calls = calls

    def draw(self, count: int, tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        with ThreadPoolExecutor(self._calls) as pool:
            list(pool.map(lambda prompt: self._reply(prompt, tokens), prompts(count)))
        return {"tokens": count * tokens, "seconds": time.perf_counter() - started}

    def _reply(self, prompt: tuple[int, ...], tokens: int) -> None:
        ids = torch.tensor([prompt])
        whole = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        assert whole.shape[1] == len(prompt) + tokens


class ContinuousBatching:
    """transformers' continuous batching, set up by hand: left alone it takes most of the memory."""

    def __init__(self, model: Any) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        model.set_attn_implementation("paged|eager")
        self._model = model
        self._settings = ContinuousBatchingConfig(
            page_size=32, num_blocks=256, max_batch_tokens=1024, return_logprobs=True
        )
        self._sampling = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)

    def draw(self, count: int, tokens: int) -> dict[str, Any]:
        self._sampling.max_new_tokens = tokens
        started = time.perf_counter()
        replies = self._model.generate_batch(
            [list(prompt) for prompt in prompts(count)],
            generation_config=self._sampling,
            continuous_batching_config=self._settings,
            progress_bar=False,
        )
        seconds = time.perf_counter() - started
        assert all(len(reply.generated_tokens) == tokens for reply in replies.values())
        return {"tokens": count * tokens, "seconds": seconds}


def main(side: str, model: str, threads: str, job_file: str, dtype: str) -> None:
    # vLLM and its processes log to standard output: theirs is standard error from now on.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    torch.set_num_threads(int(threads))
    loaded = load_model(model, dtype)
    made: Any
    if side == "engine":
        made = Engine(loaded, Path(job_file))
    elif side == "batching":
        made = ContinuousBatching(loaded)
    else:
        made = Generate(loaded, int(side.removeprefix("generate-")))
    say(ready=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        method: Callable[..., dict[str, Any]] = getattr(made, name)
        say(**method(*(float(number) if "." in number else int(number) for number in numbers)))


if __name__ == "__main__":
    main(*sys.argv[1:])
