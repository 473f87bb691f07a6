"""A follower over the real engine, and a weight store in memory that says what a test lets it say."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping

import torch
from tiny_llama import canary_logprobs, config_json, published, reference_logprobs, tiny_model

from longshore.errors import NotFound, Unavailable
from longshore.generator import llama_forward
from longshore.generator.canary import Proof
from longshore.generator.engine import Engine, EngineStatus
from longshore.generator.follower import Follower
from longshore.generator.llama_config import read_config
from longshore.generator.metrics import REFUSED, EngineMetrics
from longshore.generator.torch_slots import SlotOptions, TorchSlotsEngine
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe, News, PolicyVersion

JOB = JobRef("default", "follower")
WAIT_S = 20.0
CANARY = (1, 2, 3, 4)
ASSETS = "a" * 64


class Store:
    """An in-memory weight store: what it holds is what a verified fetch gives."""

    def __init__(self) -> None:
        self.versions: dict[int, PolicyVersion] = {}
        self.bundles = {ASSETS: {"config.json": config_json(tiny_model(0))}}
        self.fetched: list[int] = []
        # Pushed and not published.
        self.withheld: set[int] = set()
        self.failures = 0
        self.pointer = "head"
        self.gate = asyncio.Event()
        self.gate.set()
        self._heads: asyncio.Queue[News] = asyncio.Queue()

    def publish(self, version: int, *, head: bool = True, seed: int | None = None, **changes: object) -> None:
        model = tiny_model(version if seed is None else seed)
        tensors = published(model)
        made = PolicyVersion(
            version=version,
            train_step=version,
            learner_epoch=1,
            assets_sha256=ASSETS,
            layout_sha256="",
            checksum=f"of seed {seed}",
            canaries=(CanaryProbe(CANARY, canary_logprobs(model, CANARY)),),
            tensors=tensors,
        )
        self.versions[version] = dataclasses.replace(made, **changes)  # type: ignore[arg-type]
        if head:
            self.point(version)

    def push(self, version: int, **changes: object) -> None:
        """Its bytes are here before the pointer."""
        self.publish(version, head=False, **changes)
        self.withheld.add(version)
        self._heads.put_nowait(News(version, published=False))

    def point(self, version: int) -> None:
        self.withheld.discard(version)
        self._heads.put_nowait(News(version, published=True))

    async def watch(self, pointer: str) -> AsyncIterator[News]:
        assert pointer == self.pointer
        while True:
            yield await self._heads.get()

    async def fetch(self, version: int) -> PolicyVersion:
        self.fetched.append(version)
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise Unavailable("the store is away")
        if version not in self.versions:
            raise NotFound(f"no version {version}")
        return self.versions[version]

    async def describe(self, version: int) -> PolicyVersion:
        if version not in self.versions or version in self.withheld:
            raise NotFound(f"no version {version}")
        return dataclasses.replace(self.versions[version], tensors=None)

    async def assets(self, sha256: str) -> dict[str, bytes]:
        return self.bundles[sha256]


class Bench:
    """A follower that runs, and what it did."""

    def __init__(self, pointer: str = "head", residents: int = 1) -> None:
        self.store = Store()
        self.store.pointer = pointer
        self.engine: Engine | None = None
        # Versions as they are staged.
        self.staged: list[int] = []
        self.serving: list[int | None] = []
        self._residents = residents
        self.follower = Follower(self.store, self._make, self._on_version, JOB, pointer)
        self.task = asyncio.create_task(self.follower.run())

    async def serve(self, version: int, **changes: object) -> None:
        self.store.publish(version, **changes)  # type: ignore[arg-type]
        await self.until(lambda: self.serving[-1:] == [version])

    @property
    def status(self) -> EngineStatus:
        assert self.engine is not None
        return self.engine.status()

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        if self.engine is not None:
            self.engine.close()

    def _make(self, config: bytes) -> Engine:
        options = SlotOptions(slots=2, max_waiting=4, cache_bytes=1 << 20, seed=0, residents=self._residents)
        engine = TorchSlotsEngine(read_config(config), options, lambda events: None, EngineMetrics(JOB))
        stage = engine.stage

        def counted(version: int, tensors: Mapping[str, torch.Tensor], proof: Proof) -> None:
            self.staged.append(version)
            stage(version, tensors, proof)

        engine.stage = counted  # type: ignore[method-assign]
        self.engine = engine
        return engine

    async def _on_version(self, engine: Engine) -> None:
        self.serving.append(engine.status().version)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.002)


def refusals(reason: str) -> float:
    return REFUSED.labels(JOB.project, JOB.job, reason)._value.get()


def scores(bench: Bench, token_ids: tuple[int, ...] = (5, 6, 7, 8)) -> torch.Tensor:
    """Log-probs under the weights that were staged last, whether they serve or not."""
    assert isinstance(bench.engine, TorchSlotsEngine)
    assert bench.engine._served is not None
    return torch.tensor(llama_forward.score(bench.engine.shape, bench.engine._served, token_ids))


def expected(seed: int, token_ids: tuple[int, ...] = (5, 6, 7, 8)) -> torch.Tensor:
    return reference_logprobs(tiny_model(seed), token_ids[:1], token_ids[1:])
