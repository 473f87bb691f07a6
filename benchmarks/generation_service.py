"""The generator service against its engine by itself: the same engine, model and load, in turns.

The real origin and generator, each a process, and a process that drives an engine without a service. Each has one
thread of torch's: the callers have the other core, as actors would. A stream asks for a reply after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.common import Report
from benchmarks.generation_models import CANARY, Load, config_of, learner_logprobs, load_model, prompts
from benchmarks.weight_sync_wan import Talker, wait_for
from longshore.actor.asking import Asking
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, sampling_pb2
from longshore.rpc import convert
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe, Tensor, VersionDraft, WeightsClient

JOB = JobRef("default", "generation")
STREAMS = (32, 128)
START_S = 300.0


class World:
    """Where the processes of one model run."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        self.job_file = folder / "job.json"
        self.key = SigningKey.create(folder / "key.pem")
        spec = {
            "name": JOB.job,
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "generator": {"engine": engine},
            "resources": {"generator_slots": max(STREAMS), "threads": 1},
        }
        document = {
            "project": JOB.project,
            "job": JOB.job,
            "spec": spec,
            "learner_public_key": self.key.public_key.hex(),
        }
        self.job_file.write_text(JobFile.model_validate(document).model_dump_json())
        self._running = ExitStack()

    def close(self) -> None:
        self._running.close()

    def side(self, side: str, model: str, threads: int, dtype: str = "float32") -> Talker:
        """A process of generation_sides; it says so when it is ready."""
        words = [side, model, str(threads), str(self.job_file), dtype]
        argv = [sys.executable, "-m", "benchmarks.generation_sides", *words]
        return self._talk(argv, f"{side}-{threads}-{dtype}", {}, threads)

    async def serve(self, model: str) -> tuple[str, Talker]:
        """An origin with one version, and a generator that serves it: the generator's address and process."""
        origin, generator = _address(), _address()
        self._service("weights", origin, STORE_URL=str(self.folder / "store"))
        await self._publish(origin, model)
        return generator, self._service("generator", generator, JOB_FILE=str(self.job_file), WEIGHTS=origin)

    async def _publish(self, origin: str, model: str) -> None:
        loaded = await asyncio.to_thread(load_model, model)
        probe = CanaryProbe(CANARY, tuple(learner_logprobs(loaded, CANARY)))
        tensors = [
            Tensor(name, "float32", tuple(own.shape), own.detach().contiguous().numpy().tobytes())
            for name, own in loaded.named_parameters()
        ]
        client = WeightsClient(origin, JOB, self.key.public_key)
        try:
            await client.register_key(2)
            draft = VersionDraft(0, 0, 1, None, (probe,), time.time())
            await client.publish(self.key, draft, tensors, {"config.json": config_of(loaded)}, timeout=120.0)
        finally:
            await client.close()

    def _service(self, service: str, address: str, **settings: str) -> Talker:
        named = {"LISTEN": address, "METRICS_LISTEN": "127.0.0.1:0", **settings}
        env = {f"LONGSHORE_{name}": value for name, value in named.items()}
        talker = self._talk([sys.executable, "-m", "longshore", "serve", service], service, env, 1)
        wait_for([], address)
        return talker

    def _talk(self, argv: Sequence[str], name: str, env: dict[str, str], threads: int) -> Talker:
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        own = {**os.environ, **limits, **env, "LONGSHORE_LOG_LEVEL": "error", "TRANSFORMERS_VERBOSITY": "error"}
        own["PYTHONPATH"] = os.pathsep.join(["services", "."])
        talker = Talker(argv, own, self.folder / f"{name}.log")
        self._running.callback(talker.end)
        return talker


class Callers:
    """Clients of a generator over an actor's stream to it."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._asking = Asking(self._channel, convert.job_to_proto(JOB))
        self._stub = generator_pb2_grpc.GeneratorServiceStub(self._channel)
        self._serial = 0
        self._tokens = 0

    async def close(self) -> None:
        await self._asking.close()
        await self._channel.close()

    async def until_served(self, generator: Talker) -> None:
        """Raises RuntimeError when the generator ends before."""
        request = generator_pb2.GetStatusRequest(job=convert.job_to_proto(JOB))
        async with asyncio.timeout(START_S):
            while True:
                generator.check()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if (await self._stub.GetStatus(request, timeout=1.0)).HasField("policy_version"):
                        return
                await asyncio.sleep(0.05)

    async def load(self, streams: int, seconds: float, tokens: int) -> float:
        """Tokens a second, with so many requests open throughout. Raises AskFailed when one of them fails."""
        self._tokens = 0
        callers = [asyncio.create_task(self._stream(prompt, tokens)) for prompt in prompts(streams)]
        started = time.perf_counter()
        ended, _ = await asyncio.wait(callers, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        rate = self._tokens / (time.perf_counter() - started)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        for caller in ended:
            caller.result()
        return rate

    async def first(self, count: int) -> list[float]:
        """Seconds from a request to its first token, with nothing else to do."""
        seconds = []
        for prompt in prompts(count):
            started = time.perf_counter()
            await self._reply(prompt, 1)
            seconds.append(time.perf_counter() - started)
        return seconds

    async def _stream(self, prompt: tuple[int, ...], tokens: int) -> None:
        while True:
            await self._reply(prompt, tokens)

    async def _reply(self, prompt: tuple[int, ...], tokens: int) -> None:
        self._serial += 1
        request = generator_pb2.ReplyRequest(
            request_id=str(self._serial),
            token_ids=prompt,
            sampling=sampling_pb2.SamplingParams(temperature=1.0, max_new_tokens=tokens),
        )
        async for event in self._asking.reply(request, START_S):
            self._tokens += len(event.token_ids)


async def measure(report: Report, world: World, load: Load, engine: str, rounds: int, window_s: float) -> None:
    """Adds the rows of the service against the bare engine, and of updates and log-probs."""
    bare = world.side("engine", load.model, 1)
    await asyncio.to_thread(bare.hear)
    address, generator = await world.serve(load.model)
    callers = Callers(address)
    named = f"{engine}, {load.model}"
    try:
        await callers.until_served(generator)
        for streams in STREAMS:
            ask = f"load {streams} {window_s} {load.reply}"
            await asyncio.to_thread(bare.ask, f"draw {streams} {load.reply}")
            await callers.load(streams, window_s / 4, load.reply)
            pairs, shares = [], []
            for _ in range(rounds):
                used = _cpu_s(bare)
                alone = await asyncio.to_thread(bare.ask, ask)
                own = (_cpu_s(bare) - used) / alone["tokens"]
                used = _cpu_s(generator)
                served = await callers.load(streams, window_s, load.reply)
                shares.append((_cpu_s(generator) - used) / (served * window_s) / own)
                pairs.append((served, alone["tokens"] / alone["seconds"]))
            ratios = [served / alone for served, alone in pairs]
            rate = statistics.median(alone for _, alone in pairs)
            report.add(
                f"{named}: service, {streams} streams",
                statistics.median(ratios),
                "x",
                against=f"the engine alone, {rate:,.0f} tokens/s; {_spread(ratios)}",
                at_least=0.95,
            )
            report.add(
                f"{named}: processor time a token, {streams} streams",
                statistics.median(shares),
                "x",
                against=f"the engine alone; the generator's process, not its callers'; {_spread(shares)}",
            )
        await _first(report, named, bare, callers, 60 * rounds)
    finally:
        await callers.close()
        generator.end()
    pauses = (await asyncio.to_thread(bare.ask, f"swaps {2 * rounds + 1} 32"))["steps"]
    report.add(
        f"{named}: pause per update, 32 requests in flight",
        statistics.median(pauses),
        "steps",
        against=f"one decode step is what there is between tokens without an update; {_spread(pauses)}",
        at_most=2.0,
    )
    await _gap(report, named, bare, load, "float32")
    bare.end()
    rounded = world.side("engine", load.model, 1, "bfloat16")
    await asyncio.to_thread(rounded.hear)
    await _gap(report, named, rounded, load, "bfloat16")


async def _gap(report: Report, named: str, side: Talker, load: Load, published: str) -> None:
    gap = await asyncio.to_thread(side.ask, f"gap 16 {load.reply}")
    report.add(
        f"{named}: largest log-prob gap to the learner",
        gap["max"],
        "nats",
        against=f"mean {gap['mean']:.2g}; computed in {gap['dtype']} of weights published in {published}",
    )


async def _first(report: Report, named: str, bare: Talker, callers: Callers, count: int) -> None:
    added = []
    alone: dict[str, Any] = {}
    for _ in range(3):
        served = await callers.first(count // 3)
        alone = await asyncio.to_thread(bare.ask, f"first {count // 3}")
        added.append(1e3 * (statistics.median(served) - statistics.median(alone["seconds"])))
    report.add(
        f"{named}: time to first token, added",
        statistics.median(added),
        "ms",
        against=f"the engine alone, {1e3 * statistics.median(alone['seconds']):.1f} ms; {_spread(added)}",
        at_most=5.0,
    )


def _cpu_s(talker: Talker) -> float:
    """Processor time that a process has used, all threads of it."""
    fields = Path(f"/proc/{talker.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spread(values: Sequence[float]) -> str:
    return f"{len(values)} rounds, {min(values):.2f}-{max(values):.2f}"


def _address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
