"""Versions as adapters over real gRPC: to readers, through a site's mirror, from a store that lost what they need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from adapted import base_tensors, beside, merged
from link import Link
from mirrored_site import MirroredSite

from longshore.errors import IntegrityError
from longshore.relay import mirror as mirror_module
from longshore.weight_store import metrics
from longshore.weight_store.payload import tensor_info
from longshore.weights.client import Copies, PolicyVersion, WeightsClient

WAIT_S = 20.0
BASE_BYTES = sum(tensor_info(tensor).num_bytes for tensor in base_tensors())


class Learner:
    """Publishes a base as version 0, and then adapters."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.client = weights.client()

    async def base(self) -> None:
        await self.client.publish(self.weights.key, self.weights.draft(0), base_tensors(), self.weights.assets)

    async def adapter(self, version: int, base: int = 0) -> None:
        draft = self.weights.draft(version)
        beside_base = beside(version, base)
        await self.client.publish(self.weights.key, draft, merged(version), self.weights.assets, beside=beside_base)


@pytest.fixture
async def learner(weights: Any) -> Learner:
    learner = Learner(weights)
    await learner.base()
    return learner


class Reader:
    """A generator's client: follows head, and takes each version."""

    def __init__(self, client: WeightsClient, copies: Copies[int]) -> None:
        self.client = client
        self.copies = copies
        self._news = client.watch()

    async def until(self, version: int) -> PolicyVersion:
        async with asyncio.timeout(WAIT_S):
            async for item in self._news:
                if item.published and item.version == version:
                    return await self.client.fetch(version)
        raise AssertionError("the watch ended")


@pytest.fixture
async def reader_of(weights: Any) -> AsyncIterator[Callable[..., Reader]]:
    made: list[WeightsClient] = []

    def make(address: str, limit: int = 3, size: int = 1 << 30) -> Reader:
        copies = Copies[int](limit, size)
        made.append(WeightsClient(address, weights.job, weights.key.public_key, copies))
        return Reader(made[-1], copies)

    yield make
    for client in made:
        await client.close()


def sent(weights: Any) -> float:
    """Bytes that stores of this process have sent of the job, asked for or not."""
    labels = (weights.job.project, weights.job.job)
    return sum(metric.labels(*labels)._value.get() for metric in (metrics.PUSHED_BYTES, metrics.SENT_BYTES))


async def test_a_reader_gets_the_base_once_and_then_adapters(learner: Learner, reader_of: Any) -> None:
    weights = learner.weights
    early = reader_of(weights.address)
    assert (await early.until(0)).tensors == tuple(base_tensors())
    before = sent(weights)
    for version in range(1, 8):
        await learner.adapter(version)
        assert (await early.until(version)).tensors == tuple(merged(version))
        assert early.copies.keys() == [0]
    # The base was pushed too long ago to be among what has arrived; it is held.
    assert (await early.client.fetch(0)).tensors == tuple(base_tensors())
    assert sent(weights) - before < BASE_BYTES / 2, "seven versions cost less than half a base"
    late = reader_of(weights.address)
    assert (await late.until(7)).tensors == tuple(merged(7))
    assert late.copies.keys() == [0]
    before = sent(weights)
    await learner.adapter(8)
    assert (await late.until(8)).tensors == tuple(merged(8))
    # Any version is one step away, and what is held need not come again.
    assert (await late.client.fetch(6)).tensors == tuple(merged(6))
    assert (await late.client.fetch(0)).tensors == tuple(base_tensors())
    assert sent(weights) - before < BASE_BYTES / 4
    assert {path.read_bytes()[:4] for path in weights.blobs if path.stat().st_size < BASE_BYTES / 2} == {b"LSA\x01"}


@pytest.mark.parametrize("held", [0, BASE_BYTES // 2, BASE_BYTES])
async def test_a_reader_with_little_or_no_room_gets_the_same(learner: Learner, reader_of: Any, held: int) -> None:
    reader = reader_of(learner.weights.address, size=held)
    for version in (1, 2):
        await learner.adapter(version)
        assert (await asyncio.wait_for(reader.client.fetch(version), WAIT_S)).tensors == tuple(merged(version))
    assert reader.copies.keys() == ([0] if held >= BASE_BYTES else [])


async def test_a_copy_that_is_not_the_base_is_found_out_and_replaced(learner: Learner, reader_of: Any) -> None:
    reader = reader_of(learner.weights.address)
    await reader.until(0)
    other = reader.copies.get(0)
    assert other is not None
    object.__setattr__(other, "tensors", tuple(base_tensors(seed=5)))
    await learner.adapter(1)
    assert (await reader.until(1)).tensors == tuple(merged(1))
    held = reader.copies.get(0)
    assert held is not None
    assert held.tensors == tuple(base_tensors())


async def test_a_store_that_lost_the_base_is_sent_it_again(learner: Learner, reader_of: Any) -> None:
    weights = learner.weights
    await learner.adapter(1)
    await weights.stop()
    (whole,) = (path for path in weights.blobs if path.stat().st_size > BASE_BYTES)
    whole.write_bytes(whole.read_bytes()[:-1] + b"\x77")
    await weights.start()
    await learner.adapter(2)
    assert (await reader_of(weights.address).until(2)).tensors == tuple(merged(2))
    assert (await learner.client.fetch(0)).tensors == tuple(base_tensors())
    # Still as an adapter, and the next one too.
    await learner.adapter(3)
    assert sum(path.read_bytes()[:4] == b"LSA\x01" for path in weights.blobs) == 3


async def test_an_adapter_that_went_bad_is_refused_and_the_next_one_is_not(learner: Learner, reader_of: Any) -> None:
    weights = learner.weights
    await learner.adapter(1)
    await weights.stop()
    (small,) = (path for path in weights.blobs if path.read_bytes()[:4] == b"LSA\x01")
    small.write_bytes(small.read_bytes()[:-1] + b"\x77")
    await weights.start()
    reader = reader_of(weights.address)
    with pytest.raises(IntegrityError):
        await asyncio.wait_for(reader.client.fetch(1), WAIT_S)
    assert (await reader.client.fetch(0)).tensors == tuple(base_tensors())
    await learner.adapter(2)
    assert (await reader.until(2)).tensors == tuple(merged(2))


async def test_beside_a_base_that_was_never_published_a_version_goes_in_full(learner: Learner, reader_of: Any) -> None:
    await learner.adapter(9, base=4)
    assert (await reader_of(learner.weights.address).until(9)).tensors == tuple(merged(9))


@pytest.fixture
async def site(
    weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[MirroredSite, Link]]:
    monkeypatch.setattr(mirror_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE_S", 0.1)
    link = Link(weights.address)
    await link.start()
    site = MirroredSite(tmp_path / "site", weights.job, weights.key.public_key, link.address)
    yield site, link
    await site.close()
    await link.stop()


async def test_a_site_mirrors_the_base_and_then_adapters(
    learner: Learner, site: tuple[MirroredSite, Link], reader_of: Any
) -> None:
    mirrored, link = site
    for version in (1, 2):
        await learner.adapter(version)
    # The relay is late, and so is its reader.
    await mirrored.start()
    reader = reader_of(mirrored.address)
    assert (await reader.until(2)).tensors == tuple(merged(2))
    assert mirrored.versions() == [2, 0]
    before = sent(learner.weights)
    for version in range(3, 8):
        await learner.adapter(version)
        assert (await reader.until(version)).tensors == tuple(merged(version))
    # Both what home has sent and what the site has.
    assert sent(learner.weights) - before < BASE_BYTES / 2
    assert reader.copies.keys() == [0]
    assert mirrored.versions() == [7, 6, 5, 4, 3, 2, 0]
    assert mirrored.faults == 0
    await link.stop()
    late = reader_of(mirrored.address)
    assert (await late.until(7)).tensors == tuple(merged(7))
