"""SIGKILL of the real process while versions are published as deltas and encodings are made in the background."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from weight_parcels import delta_parcel, full_parcel, history

from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc.channel import channel
from longshore.weight_store.decoding import CODECS
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import open_objects
from longshore.weight_store.planner import Step, path_kind
from longshore.weight_store.store import POLICY, WeightStore
from longshore.weights.parcel import Parcel
from tests.contract.test_weights_crash import DEADLINE_S, MortalStore

TENSORS = history(40, size=1_000_000, edits=5_000)
# So that a kill falls within a payload.
CHUNK = 1_000
# A delta publish writes blob, assets, encoding, manifest and head. Killed before the n-th of these, the new version is
# published or is not.
POINTS = {1: False, 2: False, 3: False, 4: False, 5: True}


class Chain:
    """Publishes each version as a delta from the one before, the first in full, past the client."""

    def __init__(self, bench, mortal: MortalStore) -> None:
        self.bench = bench
        self.mortal = mortal
        self.folder = str(bench.folder)

    def parcel(self, version: int) -> Parcel:
        names = {"key": self.bench.key, "job": self.bench.job}
        if version == 0:
            return full_parcel(0, TENSORS[0], **names)
        return delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1], **names)

    async def send(self, parcel: Parcel, stop_after: int | None = None) -> weights_pb2.PublishResponse:
        """With `stop_after`, kills the store when so many of the payload's bytes are on their way."""
        payload = b"".join(parcel.parts)

        async def messages():
            yield weights_pb2.PublishRequest(header=parcel.header)
            for start in range(0, len(payload), CHUNK):
                if stop_after is not None and start >= stop_after:
                    self.mortal.close()
                    return
                yield weights_pb2.PublishRequest(chunk=payload[start : start + CHUNK])

        async with channel(self.bench.address) as opened:
            stub = weights_pb2_grpc.WeightsServiceStub(opened)
            return await stub.Publish(messages(), timeout=DEADLINE_S)

    async def publish(self, version: int) -> bool:
        """Until it is there. True when it was there already."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return (await self.send(self.parcel(version))).existed
                await asyncio.sleep(0.05)

    async def kind(self, version: int, have: int) -> str:
        """Of the path that the running store tells."""
        request = weights_pb2.GetVersionRequest(
            version=version, weight_set=weights_pb2.WEIGHT_SET_POLICY, have=[have], codecs=CODECS
        )
        request.job.project, request.job.job = self.bench.job.project, self.bench.job.job
        async with channel(self.bench.address) as opened:
            stub = weights_pb2_grpc.WeightsServiceStub(opened)
            response = await stub.GetVersion(request, timeout=DEADLINE_S)
        return path_kind([Step(step.version, step.encoding) for step in response.path])

    def head(self) -> int:
        """Where head is on the disk, with the store dead; every version on hand is decoded as a newcomer would."""
        store = WeightStore(open_objects(self.folder))
        state = store.pointer(self.bench.job, "head")
        assert state is not None
        numbers = store.versions(self.bench.job, POLICY, None, 100)
        assert state[0].version in numbers
        for number in numbers:
            fresh = WeightStore(open_objects(self.folder))
            copy = fresh.copies.get(self.bench.job, VersionKey(POLICY, number))
            assert copy.tensors == tuple(TENSORS[number]), number
        return state[0].version

    def check_no_garbage(self) -> None:
        """After the grace, nothing lies there but what versions are made of."""
        store = WeightStore(open_objects(self.folder), clock=lambda: time.time() + 3600)
        store.collect(self.bench.job)
        catalog = store._books.catalog(self.bench.job).all()
        known = {item.sha256.hex() for items in catalog.values() for item in items}
        assert {path.name for path in self.bench.blobs} == known
        root = self.bench.job_folder / "versions/policy"
        assert {path.name for path in root.glob("*/encodings/*")} == known
        assert {int(path.parent.name) for path in root.glob("*/manifest")} == {key.version for key in catalog}
        assert not [path for path in self.bench.job_folder.rglob("*") if "#" in path.name]


@pytest.fixture
async def chain(stopped_weights, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Chain]:
    mortal = MortalStore(stopped_weights, tmp_path, *getattr(request, "param", ()))
    mortal.start()
    await mortal.accepting()
    await stopped_weights.client().register_key(keep=3)
    yield Chain(stopped_weights, mortal)
    mortal.close()


async def restart(chain: Chain) -> None:
    chain.mortal.start()
    await chain.mortal.accepting()


async def test_a_delta_publish_killed_at_every_write_can_be_repeated(chain: Chain) -> None:
    await chain.publish(0)
    for version, (point, published) in enumerate(POINTS.items(), start=1):
        chain.mortal.order.write_text(f"write {point}")
        with pytest.raises(grpc.aio.AioRpcError):
            await chain.send(chain.parcel(version))
        await chain.mortal.death()
        # A head that a crash left undone is finished by who looks next.
        assert chain.head() == (version if published else version - 1)
        await restart(chain)
        assert await chain.publish(version) is published
    assert chain.mortal.end() == 0
    assert chain.head() == len(POINTS)
    chain.check_no_garbage()


async def test_a_delta_publish_killed_at_any_byte_of_its_payload_leaves_the_version_before(chain: Chain) -> None:
    source = random.Random(7)
    await chain.publish(0)
    for version in range(1, 4):
        parcel = chain.parcel(version)
        stop_after = source.randrange(sum(map(len, parcel.parts)) - CHUNK)
        sending = asyncio.create_task(chain.send(parcel, stop_after))
        await asyncio.wait([sending])
        assert sending.cancelled() or sending.exception()
        assert chain.head() == version - 1
        await restart(chain)
        assert await chain.publish(version) is False
    assert chain.mortal.end() == 0
    chain.check_no_garbage()


@pytest.mark.parametrize("chain", [("upkeep",)], indirect=True)
@pytest.mark.parametrize("point", [1, 2])
async def test_a_background_encoding_killed_at_every_write_is_made_again(chain: Chain, point: int) -> None:
    # Nothing is made in the background for these: each is a small delta from the one before.
    for version in range(8):
        await chain.publish(version)
    # The first merged delta's blob, and its record.
    chain.mortal.order.write_text(f"background {point}")
    assert await chain.publish(8) is False
    await chain.mortal.death()
    assert chain.head() == 8
    await restart(chain)
    await chain.publish(9)
    async with asyncio.timeout(DEADLINE_S):
        while await chain.kind(9, have=1) != "merged":  # noqa: ASYNC110 - another process's work
            await asyncio.sleep(0.05)
    assert chain.mortal.end() == 0
    assert chain.head() == 9
    chain.check_no_garbage()


@pytest.mark.parametrize("chain", [("upkeep",)], indirect=True)
async def test_a_store_killed_at_random_moments_loses_no_version_that_it_answered_for(chain: Chain) -> None:
    source = random.Random(11)
    version = answered = -1
    for _ in range(4):
        kill_at = time.monotonic() + source.uniform(0.2, 1.5)
        # On a quick machine the versions would run out: one is left for the end.
        while time.monotonic() < kill_at and version < len(TENSORS) - 2:
            publishing = asyncio.create_task(chain.publish(version + 1))
            done, _ = await asyncio.wait([publishing], timeout=max(0.0, kill_at - time.monotonic()))
            if not done:
                chain.mortal.close()
                publishing.cancel()
                await asyncio.wait([publishing])
                break
            answered = version = version + 1
        chain.mortal.close()
        if answered >= 0:
            assert chain.head() in {answered, answered + 1}
        await restart(chain)
    await chain.publish(version + 1)
    assert chain.mortal.end() == 0
    assert chain.head() == version + 1
    chain.check_no_garbage()
