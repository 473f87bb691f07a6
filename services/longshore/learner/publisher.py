"""Publishes policy versions while the next batch is already being trained on.

version = await publisher.publish(...)   # waits for the one before, copies the weights, returns at once
await publisher.wait()                   # until the last one is in the store
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from longshore.errors import NotFound
from longshore.learner.disk import when_there_is_room
from longshore.learner.durable_lines import append_line, read_lines
from longshore.learner.lora import holding, merged_parameters
from longshore.learner.trainer import canary_logprobs
from longshore.signing import SigningKey
from longshore.weight_store.version import EVALUATED
from longshore.weights.client import CanaryProbe, Tensor, VersionDraft, WeightsClient, checksum_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# For how long a version is held in the store at most while it is evaluated.
PINNED_S = 24 * 3600.0


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from."""

    train_step: int
    learner_epoch: int
    parent_version: int | None


class VersionLog:
    """Checksums of the versions that this job published, which outlive the store's retention."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checksums: dict[int, str] = {}
        for item in read_lines(path):
            self._checksums[item["version"]] = item["checksum"]

    def append(self, version: int, checksum: str) -> None:
        self._checksums[version] = checksum
        append_line(self._path, {"version": version, "checksum": checksum}, sync=False)

    def checksum(self, version: int) -> str | None:
        return self._checksums.get(version)


class Publisher:
    """One publish at a time, in the background."""

    def __init__(
        self,
        client: WeightsClient,
        key_file: Path,
        assets: Mapping[str, bytes],
        dtype: str,
        canary: list[int],
        log: VersionLog,
    ) -> None:
        self._client = client
        self._key_file = key_file
        self._assets = assets
        self._dtype = dtype
        self._canary = canary
        self._log = log
        self._running: asyncio.Task[None] | None = None
        # Highest version that exists: numbers up to it are taken.
        self._taken = -1

    async def start(self) -> None:
        """Learns which numbers are taken."""
        try:
            self._taken = await self._client.head(timeout=30.0)
        except NotFound:
            self._taken = -1

    @property
    def newest(self) -> int:
        """Highest version that exists or is on its way, of whichever incarnation."""
        return self._taken

    async def publish(self, policy: torch.nn.Module, version: int, lineage: Lineage, *, pinned: bool = False) -> int:
        """Publishes the policy's present weights and returns their version. One that is `pinned` stays in the store
        until the next one is, or for a day: it will be asked for by its number.

        `version` is the number wanted. Where an earlier incarnation has published it already, equal weights *are*
        that version; other weights get the first free number (law 5).
        """
        await self.wait()
        tensors, canary = await asyncio.to_thread(self._copy, policy)
        if version <= self._taken:
            if await self._same(version, tensors):
                return version
            version = self._taken + 1
        draft = VersionDraft(
            version=version,
            train_step=lineage.train_step,
            learner_epoch=lineage.learner_epoch,
            parent_version=lineage.parent_version,
            canaries=(canary,),
            created_at=time.time(),
        )
        self._taken = max(self._taken, version)
        checksum = checksum_of(tensors)
        await when_there_is_room(lambda: self._log.append(version, checksum), "a version's checksum")
        # Read anew each time: it may have been rotated.
        key = await asyncio.to_thread(SigningKey.load, self._key_file)
        self._running = asyncio.create_task(self._send(key, draft, tensors, pinned))
        return version

    async def _send(self, key: SigningKey, draft: VersionDraft, tensors: list[Tensor], pinned: bool) -> None:
        await self._client.publish(key, draft, tensors, self._assets)
        if pinned:
            await self._client.point(key, EVALUATED, draft.version, PINNED_S)

    async def wait(self) -> None:
        """Until the version before is in the store. Raises whatever its publish raised."""
        if self._running is not None:
            running, self._running = self._running, None
            await running

    async def _same(self, version: int, tensors: list[Tensor]) -> bool:
        checksum = checksum_of(tensors)
        known = self._log.checksum(version)
        if known is not None:
            return known == checksum
        try:
            return (await self._client.describe(version)).checksum == checksum
        except NotFound:
            # Retired, and not in our log: it cannot be compared, so the weights get a number of their own.
            return False

    def _copy(self, policy: torch.nn.Module) -> tuple[list[Tensor], CanaryProbe]:
        dtype = _DTYPES[self._dtype]
        rounded = {name: parameter.to(dtype) for name, parameter in merged_parameters(policy).items()}
        tensors = [
            Tensor(name, self._dtype, tuple(value.shape), value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            for name, value in rounded.items()
        ]
        # The canary is computed with the weights as published, so that rounding is not taken for a fault.
        widened = {name: value.float() for name, value in rounded.items()}
        with holding(policy, widened):
            logprobs = canary_logprobs(policy, self._canary)
        return tensors, CanaryProbe(tuple(self._canary), tuple(logprobs))
