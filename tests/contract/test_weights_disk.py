"""A disk that is really full: under a publish, and under the background work."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from processes import Service
from prometheus_client import REGISTRY
from weight_parcels import JOB, KEY, Bench, delta_parcel, full_parcel, history

from chaos.disk import SmallDisk, why_not
from longshore.proto.v1 import weights_pb2_grpc
from longshore.rpc.channel import channel
from longshore.weight_store.decoding import CODECS
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StorageFull, open_objects
from longshore.weight_store.planner import path_kind
from longshore.weight_store.store import POLICY
from longshore.weight_store.upkeep import Upkeep
from longshore.weights.client import WeightsClient

TENSORS = history(12, size=400_000, edits=20_000)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if why := why_not():
        pytest.skip(why)
    disk = SmallDisk(tmp_path / "disk", megabytes=8)
    disk.mount()
    yield disk
    disk.close()


def leave(disk: SmallDisk, free: int) -> None:
    """Fills the disk but for about so many bytes; it is given out in pages."""
    disk.fill()
    ballast = disk.folder / "ballast"
    os.truncate(ballast, ballast.stat().st_size - free)


@pytest.mark.parametrize("free", [0, 4_096, 24_576, 45_056, 65_536])
@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_publish_that_runs_out_of_room_changes_nothing_and_succeeds_later(
    disk: SmallDisk, kind: str, free: int
) -> None:
    bench = Bench(open_objects(str(disk.folder / "store")), keep=4)
    bench.publish(full_parcel(0, TENSORS[0]))
    bench.publish(delta_parcel(1, TENSORS[1], 0, TENSORS[0]))
    make = {
        "full": lambda: full_parcel(2, TENSORS[2]),
        "delta": lambda: delta_parcel(2, TENSORS[2], 1, TENSORS[1]),
    }[kind]
    leave(disk, free)
    try:
        bench.publish(make())
    except StorageFull:
        # Head is the last to be written: the version may be there without it, until it is published again.
        assert bench.store.pointer(JOB, "head")[0].version in {1, 2}
    else:
        assert free >= len(make().parts[0])
    for restarted in (False, True):
        if restarted:
            bench.restarted()
        assert bench.tensors(1) == tuple(TENSORS[1])
    disk.free()
    bench.publish(make())
    assert (bench.head(), bench.numbers()) == (2, [2, 1, 0])
    assert bench.tensors(2) == tuple(TENSORS[2])
    bench.now = 10**10
    bench.store.collect(JOB)
    known = {item.sha256.hex() for number in range(3) for item in bench.store.version(JOB, _key(number))[1]}
    folder = disk.folder / "store/p/j"
    assert {path.name for path in (folder / "blobs").iterdir()} == known


def test_background_work_without_room_is_counted_and_goes_on_later(disk: SmallDisk) -> None:
    bench = Bench(open_objects(str(disk.folder / "store")), keep=12)
    upkeep = Upkeep(bench.store)
    bench.publish(full_parcel(0, TENSORS[0]))
    for version in range(1, 10):
        bench.publish(delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1]))
    leave(disk, 8_192)
    before = _without_room()
    upkeep.work(JOB, POLICY)
    assert _without_room() > before
    assert path_kind(bench.store.path(JOB, _key(9), [1], CODECS)) == "deltas"
    assert bench.tensors(9) == tuple(TENSORS[9])
    disk.free()
    upkeep.work(JOB, POLICY)
    assert path_kind(bench.store.path(JOB, _key(9), [1], CODECS)) == "merged"
    assert bench.tensors(9) == tuple(TENSORS[9])


async def test_the_process_says_that_its_disk_is_full_and_serves_on(disk: SmallDisk, tmp_path: Path) -> None:
    service = Service("weights", tmp_path, store_url=disk.folder / "store", host_copies_mb=64)
    service.start()
    try:
        service.wait_serving()
        client = WeightsClient(service.address, JOB, KEY.public_key)
        await client.register_key(keep=12)

        async def send(parcel) -> None:
            async with channel(service.address) as opened:
                await weights_pb2_grpc.WeightsServiceStub(opened).Publish(parcel.messages(), timeout=20)

        await send(full_parcel(0, TENSORS[0]))
        disk.fill()
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await send(delta_parcel(1, TENSORS[1], 0, TENSORS[0]))
        assert info.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.fetch(0)).tensors == tuple(TENSORS[0])
        assert await client.head() == 0
        disk.free()
        for version in range(1, 10):
            await send(delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1]))
        assert await client.head() == 9
        await client.close()
        text = await asyncio.to_thread(_metrics, service)
        assert "longshore_weights_host_copy_bytes " in text
        assert 'longshore_weights_publishes_total{job="j",project="p",result="published"} 10.0' in text
    finally:
        service.stop()


def _without_room() -> float:
    name = "longshore_weights_background_encodings_total"
    labels = {"project": JOB.project, "job": JOB.job, "result": "disk_full"}
    return sum(REGISTRY.get_sample_value(name, {**labels, "kind": kind}) or 0.0 for kind in ("full", "merged"))


def _metrics(service: Service) -> str:
    with urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=10) as answer:
        return answer.read().decode()


def _key(version: int) -> VersionKey:
    return VersionKey(POLICY, version)
