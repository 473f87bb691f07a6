"""Publishes policy versions while the next batch is already being trained on.

version = await publisher.publish(...)   # waits for the one before, copies the weights, returns at once
await publisher.wait()                   # until the last one is in the store
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longshore.errors import NotFound
from longshore.learner.disk import when_there_is_room
from longshore.learner.durable_lines import append_line, read_lines
from longshore.learner.published import Weights, probe, published
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.signing import SigningKey
from longshore.weight_store.version import EVALUATED
from longshore.weights.client import Beside, CanaryProbe, Tensor, VersionDraft, WeightsClient, checksum_of

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

    def version_of(self, checksum: str) -> int | None:
        """The first version with these weights."""
        return min((version for version, own in self._checksums.items() if own == checksum), default=None)

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
        ranks: Ranks = ALONE,
    ) -> None:
        self._client = client
        self._key_file = key_file
        self._assets = assets
        self._dtype = dtype
        self._canary = canary
        self._log = log
        self._ranks = ranks
        self._running: asyncio.Task[None] | None = None
        # Highest version that exists: numbers up to it are taken.
        self._taken = -1
        # Of a policy with adapters: the model without them, as published.
        self._base: Sequence[Tensor] | None = None
        self._base_checksum = ""

    async def start(self) -> None:
        """Learns which numbers are taken."""
        # The newest on hand need not be head's: a base of adapters never is.
        self._taken = max(await self._client.versions(limit=1, timeout=30.0), default=-1)
        with contextlib.suppress(NotFound):
            self._taken = max(self._taken, await self._client.head(timeout=30.0))

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
        weights = await asyncio.to_thread(self._published, policy)
        checksum = await asyncio.to_thread(checksum_of, weights.tensors)
        if version <= self._taken:
            # After a warm start version 0 is the model before it, and version 1 what it gave.
            for number in (version, version + 1) if weights.adapted else (version,):
                if number <= self._taken and await self._same(number, checksum):
                    return number
            version = self._taken + 1
        beside = None
        if weights.adapted is not None:
            self._base = weights.adapted.base
            base_version = await self._base_version(policy, version, checksum, lineage)
            version = max(version, self._taken + 1)
            if base_version is not None and weights.adapted.is_sendable:
                beside = Beside(base_version, weights.adapted.base, weights.adapted.products)
        draft = _draft(version, lineage, weights.canary)
        await self._take(version, checksum)
        # Read anew each time: it may have been rotated.
        key = await asyncio.to_thread(SigningKey.load, self._key_file)
        self._running = asyncio.create_task(self._send(key, draft, weights.tensors, beside, pinned))
        return version

    async def _base_version(self, policy: torch.nn.Module, version: int, checksum: str, lineage: Lineage) -> int | None:
        """The version that is the model without adapters, published as `version` if there is none yet.

        None: the weights with this checksum are that model.
        """
        base = self._base
        assert base is not None
        own = self._base_checksum = self._base_checksum or await asyncio.to_thread(checksum_of, base)
        known = self._log.version_of(own)
        if known is not None and known < version:
            return known
        if own == checksum:
            return None
        # Something was trained before anything was published: a warm start.
        canary = await asyncio.to_thread(self._probed, policy, base)
        key = await asyncio.to_thread(SigningKey.load, self._key_file)
        await self._take(version, own)
        await self._client.publish(key, _draft(version, lineage, canary), base, self._assets, heads=False)
        return version

    def _published(self, policy: torch.nn.Module) -> Weights:
        with self._ranks.command("publish", {"dtype": self._dtype, "canary": self._canary}):
            return published(policy, self._dtype, self._canary, self._base, self._ranks)

    def _probed(self, policy: torch.nn.Module, base: Sequence[Tensor]) -> CanaryProbe:
        with self._ranks.command("probe", {"canary": self._canary}):
            return probe(policy, base, self._canary)

    async def _take(self, version: int, checksum: str) -> None:
        self._taken = max(self._taken, version)
        await when_there_is_room(lambda: self._log.append(version, checksum), "a version's checksum")

    async def _send(
        self,
        key: SigningKey,
        draft: VersionDraft,
        tensors: Sequence[Tensor],
        beside: Beside | None,
        pinned: bool,
    ) -> None:
        await self._client.publish(key, draft, tensors, self._assets, beside=beside)
        if pinned:
            await self._client.point(key, EVALUATED, draft.version, PINNED_S)

    async def wait(self) -> None:
        """Until the version before is in the store. Raises whatever its publish raised."""
        if self._running is not None:
            running, self._running = self._running, None
            await running

    async def _same(self, version: int, checksum: str) -> bool:
        known = self._log.checksum(version)
        if known is not None:
            return known == checksum
        try:
            return (await self._client.describe(version)).checksum == checksum
        except NotFound:
            # Retired, and not in our log: it cannot be compared, so the weights get a number of their own.
            return False


def _draft(version: int, lineage: Lineage, canary: CanaryProbe) -> VersionDraft:
    return VersionDraft(
        version=version,
        train_step=lineage.train_step,
        learner_epoch=lineage.learner_epoch,
        parent_version=lineage.parent_version,
        canaries=(canary,),
        created_at=time.time(),
    )
