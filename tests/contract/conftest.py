"""A weight store on loopback, and makers of what a learner publishes."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe, Tensor, VersionDraft, WeightsClient
from longshore.weights.config import WeightsSettings
from longshore.weights.service import serve


class WeightsBench:
    """One job, its learner's key, and a store process's own `serve` on a fixed port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.folder = folder / "store"
        self.store_url = str(self.folder)
        self.job = JobRef("default", "job-1")
        self.key = SigningKey.generate()
        self.assets = {"config.json": b'{"hidden_size": 8}', "tokenizer.json": b"{}" * 100}
        self._clients: list[WeightsClient] = []
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    @property
    def job_folder(self) -> Path:
        return self.folder / self.job.project / self.job.job

    @property
    def blobs(self) -> list[Path]:
        return sorted((self.job_folder / "blobs").iterdir())

    @property
    def full_blobs(self) -> list[Path]:
        """Without the deltas that the store makes in the background."""
        return [path for path in self.blobs if path.read_bytes()[:4] != b"LSD\x01"]

    async def start(self) -> None:
        self._stop = asyncio.Event()
        settings = WeightsSettings(listen=self.address, store_url=self.store_url, drain_s=2.0)
        self._serving = asyncio.create_task(serve(settings, self._stop))

    async def stop(self) -> None:
        if self._serving is not None:
            self._stop.set()
            await asyncio.wait_for(self._serving, 10)
            self._serving = None

    def client(self, key: SigningKey | None = None) -> WeightsClient:
        self._clients.append(WeightsClient(self.address, self.job, (key or self.key).public_key))
        return self._clients[-1]

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.stop()

    @staticmethod
    def tensors(seed: int, size: int = 1000) -> list[Tensor]:
        """Two tensors of different dtypes, whose bytes depend on the seed."""
        block = hashlib.sha256(str(seed).encode()).digest()
        data = (block * (size * 4 // 32 + 1))[: size * 4]
        return [
            Tensor("embed.weight", "bfloat16", (2, size), data),
            Tensor("norm.weight", "float32", (size,), data[::-1]),
        ]

    @staticmethod
    def draft(version: int, epoch: int = 1) -> VersionDraft:
        return VersionDraft(
            version=version,
            train_step=version * 10,
            learner_epoch=epoch,
            parent_version=version - 1 if version else None,
            canaries=(CanaryProbe((1, 2, 3), (-0.5, -0.25)),),
            created_at=1_700_000_000.5,
        )

    async def publish(self, client: WeightsClient, version: int, epoch: int = 1, size: int = 1000) -> bool:
        """Publishes the version whose tensors are made from its number."""
        return await client.publish(self.key, self.draft(version, epoch), self.tensors(version, size), self.assets)


@pytest.fixture
async def weights(tmp_path: Path) -> AsyncIterator[WeightsBench]:
    """A running store that knows the job's key and keeps three versions."""
    bench = WeightsBench(tmp_path)
    await bench.start()
    await bench.client().register_key(keep=3)
    yield bench
    await bench.close()


@pytest.fixture
async def stopped_weights(tmp_path: Path) -> AsyncIterator[WeightsBench]:
    """As `weights`, but nothing runs yet."""
    bench = WeightsBench(tmp_path)
    yield bench
    await bench.close()


@pytest.fixture(scope="session", autouse=True)
def _end_vllm() -> Iterator[None]:
    """vLLM's processes end before the tests' output does."""
    yield
    rig = sys.modules.get("vllm_rig")
    if rig is not None:
        rig.end()
