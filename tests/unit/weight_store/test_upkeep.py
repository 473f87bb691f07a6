"""The background work on a store, without its thread unless it is about that."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from weight_parcels import JOB, Bench, delta_parcel, full_parcel, history

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.background import keep_up
from longshore.weight_store.codec import delta
from longshore.weight_store.decoding import CODECS
from longshore.weight_store.layout import VersionKey, blob_path
from longshore.weight_store.objects import Objects, StorageFull, open_objects
from longshore.weight_store.planner import path_bytes, path_kind
from longshore.weight_store.store import POLICY
from longshore.weight_store.upkeep import Upkeep

TENSORS = history(80)
DENSE = [history(1, seed=seed)[0] for seed in range(12)]


@pytest.fixture
def bench() -> Bench:
    return Bench(keep=8)


def publish_chain(bench: Bench, versions: range, upkeep: Upkeep | None = None, tensors=TENSORS) -> None:
    """Each version as a delta, the first of all in full; with the background work after each."""
    for version in versions:
        if version == 0:
            bench.publish(full_parcel(0, tensors[0]))
        else:
            bench.publish(delta_parcel(version, tensors[version], version - 1, tensors[version - 1]))
        if upkeep:
            upkeep.work(JOB, POLICY)
        bench.store.collect(JOB)


def path(bench: Bench, want: int, *have: int):
    return bench.store.path(JOB, VersionKey(POLICY, want), have, CODECS)


def counted(kind: str, result: str) -> float:
    labels = {"project": JOB.project, "job": JOB.job, "kind": kind, "result": result}
    return REGISTRY.get_sample_value("longshore_weights_background_encodings_total", labels) or 0.0


def test_who_is_8_or_64_versions_behind_gets_one_merged_delta(bench: Bench) -> None:
    publish_chain(bench, range(80), Upkeep(bench.store))
    for behind, share in ((8, 0.9), (64, 0.9)):
        steps = path(bench, 79, 79 - behind)
        assert path_kind(steps) == "merged"
        singles = sum(len(delta.encode(TENSORS[version - 1], TENSORS[version])) for version in range(80 - behind, 80))
        assert path_bytes(steps) < share * singles
    # One that is a few versions older than that takes them besides.
    for have in (14, 70):
        steps = path(bench, 79, have)
        assert (len(steps), path_kind(steps[1:] or steps)) in {(2, "delta"), (2, "merged")}
    for version in bench.numbers():
        assert bench.tensors(version) == tuple(TENSORS[version])


def test_a_newcomer_never_takes_many_more_bytes_than_a_full_encoding(bench: Bench) -> None:
    publish_chain(bench, range(80), Upkeep(bench.store))
    for version in bench.numbers()[:8]:
        steps = path(bench, version)
        assert path_bytes(steps[1:]) <= 0.5 * steps[0].encoding.size + max(
            step.encoding.size for step in steps[1:] or steps
        )
    fulls = [
        item.size
        for number in bench.numbers()
        for item in bench.store.version(JOB, VersionKey(POLICY, number))[1]
        if item.kind == weights_pb2.ENCODING_KIND_FULL
    ]
    assert 1 <= len(fulls) <= 5


def test_merged_deltas_of_older_versions_go(bench: Bench) -> None:
    publish_chain(bench, range(40), Upkeep(bench.store))
    merged = {
        number
        for number in bench.numbers()
        for item in bench.store.version(JOB, VersionKey(POLICY, number))[1]
        if item.kind == weights_pb2.ENCODING_KIND_MERGED_DELTA
    }
    assert set(range(32, 40)) <= merged
    on_paths = {step.version for version in range(32, 40) for step in path(bench, version)}
    assert merged <= set(range(32, 40)) | on_paths


def test_a_merged_delta_that_is_not_smaller_is_not_kept_nor_tried_again_at_once(bench: Bench) -> None:
    before = counted("merged", "not_smaller")
    publish_chain(bench, range(12), Upkeep(bench.store), tensors=DENSE)
    assert counted("merged", "not_smaller") == before + 1
    assert all(path_kind(path(bench, 11, base)) != "merged" for base in range(11))


def test_only_the_copies_that_are_of_use_again_stay_in_memory(bench: Bench) -> None:
    publish_chain(bench, range(75), Upkeep(bench.store))
    assert bench.store.copies.held(JOB, POLICY) == {74, 66, 10}


def test_a_restarted_store_goes_on_merging(bench: Bench) -> None:
    publish_chain(bench, range(20), Upkeep(bench.store))
    bench.restarted()
    publish_chain(bench, range(20, 21), Upkeep(bench.store))
    assert path_kind(path(bench, 20, 12)) == "merged"


def test_without_memory_for_it_nothing_is_merged_and_all_else_works(bench: Bench) -> None:
    bench.restarted(copy_bytes=25_000)
    before = counted("merged", "no_memory")
    publish_chain(bench, range(20), Upkeep(bench.store))
    assert counted("merged", "no_memory") == before + 12
    assert path_kind(path(bench, 19, 11)) == "deltas"
    assert bench.tensors(19) == tuple(TENSORS[19])


def test_versions_published_in_full_get_deltas_too(bench: Bench) -> None:
    upkeep = Upkeep(bench.store)
    for version in range(9):
        bench.publish(full_parcel(version, TENSORS[version]))
    upkeep.work(JOB, POLICY)
    assert len(bench.store.version(JOB, VersionKey(POLICY, 8))[1]) == 3
    assert path_kind(path(bench, 8, 7)) == "delta"
    assert path_kind(path(bench, 8, 0)) == "merged"
    assert path_kind(path(bench, 8)) == "full"


def test_a_version_without_a_way_to_it_gets_an_anchor_from_memory(bench: Bench) -> None:
    """A damaged single delta cuts newcomers off; the host copy of head does not need it."""
    publish_chain(bench, range(3))
    single = path(bench, 1, 0)[0].encoding
    bench.objects.put(blob_path(JOB, single.sha256), b"rubbish")
    for version in range(3):
        bench.store.copies.discard(JOB, VersionKey(POLICY, version)) if version < 2 else None
    with pytest.raises(Exception, match="no sound way"):
        bench.store.copies.get(JOB, VersionKey(POLICY, 1))
    assert path(bench, 2) is None
    Upkeep(bench.store).work(JOB, POLICY)
    assert path_kind(path(bench, 2)) == "full"
    assert bench.tensors(2) == tuple(TENSORS[2])


def test_a_full_disk_while_merging_is_counted_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(open_objects(str(tmp_path)), keep=8)
    upkeep = Upkeep(bench.store)
    publish_chain(bench, range(8), upkeep)
    before = counted("merged", "disk_full")
    put = Objects.put

    def full(self: Objects, path: str, data: object) -> None:
        if "/blobs/" in path:
            raise StorageFull(f"no room for {path}")
        put(self, path, data)  # type: ignore[arg-type]

    bench.publish(delta_parcel(8, TENSORS[8], 7, TENSORS[7]))
    with monkeypatch.context() as patched:
        patched.setattr(Objects, "put", full)
        upkeep.work(JOB, POLICY)
    assert counted("merged", "disk_full") == before + 1
    assert path_kind(path(bench, 8, 0)) == "deltas"
    publish_chain(bench, range(9, 10), upkeep)
    assert path_kind(path(bench, 9, 1)) == "merged"


async def test_its_thread_works_when_it_is_woken_and_ends_when_told(bench: Bench) -> None:
    upkeep, stop = Upkeep(bench.store), asyncio.Event()
    bench.store.when_published(upkeep.wake)
    running = asyncio.create_task(keep_up(upkeep, stop))
    publish_chain(bench, range(9))
    async with asyncio.timeout(20):
        while path_kind(path(bench, 8, 0)) != "merged":  # noqa: ASYNC110 - another thread's work
            await asyncio.sleep(0.01)
        stop.set()
        await running


async def test_a_mistake_in_its_thread_is_raised(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise AssertionError("a mistake")

    monkeypatch.setattr(Upkeep, "work", wrong)
    upkeep = Upkeep(bench.store)
    upkeep.wake(JOB, VersionKey(POLICY, 0))
    with pytest.raises(AssertionError, match="a mistake"):
        await asyncio.wait_for(keep_up(upkeep, asyncio.Event()), 20)


async def test_leftovers_are_swept_at_the_start(tmp_path: Path) -> None:
    bench = Bench(open_objects(str(tmp_path)), keep=8)
    publish_chain(bench, range(2))
    for path in ("p/j/blobs/" + "ab" * 32, "p/other/blobs/" + "cd" * 32):
        bench.objects.put(path, b"left behind")
    assert bench.store.jobs() == [JOB, JobRef("p", "other")]
    bench.now = 10**10
    upkeep, stop = Upkeep(bench.store), asyncio.Event()
    running = asyncio.create_task(keep_up(upkeep, stop))
    async with asyncio.timeout(20):
        while len(bench.objects.list("p/j/blobs")) > 2:  # noqa: ASYNC110 - another thread's work
            await asyncio.sleep(0.01)
    stop.set()
    await running
    assert bench.numbers() == [1, 0]
