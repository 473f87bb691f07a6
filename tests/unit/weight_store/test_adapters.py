"""Versions that are adapters beside one base, in a store: the base stays, is brought once, and needs no deltas."""

from __future__ import annotations

import asyncio

import pytest
from adapted import adapter_parcel, base_tensors, merged
from weight_parcels import JOB, KEY, Bench, full_parcel

from longshore.errors import Fenced, IntegrityError, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store import retention
from longshore.weight_store.copies import Copies, HostCopy
from longshore.weight_store.decoding import CODECS, DELTA, PLANES
from longshore.weight_store.hub import PointerHub
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.payload import tensor_info
from longshore.weight_store.planner import legs, path_kind
from longshore.weight_store.pushing import MAX_HELD, Pushes, Wanted
from longshore.weight_store.store import POLICY
from longshore.weight_store.upkeep import Upkeep
from longshore.weights.parcel import again


def key(version: int) -> VersionKey:
    return VersionKey(POLICY, version)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(keep=2)
    bench.publish(full_parcel(0, base_tensors()))
    return bench


def test_a_version_is_its_sum_whoever_decodes_it(bench: Bench) -> None:
    for version in (1, 2, 5):
        bench.publish(adapter_parcel(version, JOB, KEY))
        assert bench.tensors(version) == tuple(merged(version))
        assert bench.store.copies.get(JOB, key(version)).tensors == tuple(merged(version))
    path = bench.store.path(JOB, key(5), (), CODECS)
    assert path is not None
    assert [[step.version for step in leg] for leg in legs(path)] == [[0], [5]]
    assert path_kind(path) == "anchored"
    assert path_kind(bench.store.path(JOB, key(5), [2, 0], CODECS)) == "adapter"
    assert bench.store.path(JOB, key(5), [0], (PLANES, DELTA)) is None


def test_the_base_is_kept_for_as_long_as_an_adapter_needs_it(bench: Bench) -> None:
    for version in range(1, 9):
        bench.publish(adapter_parcel(version, JOB, KEY))
        # A full encoding of each, so that no newcomer needs the base: the next adapter does.
        bench.publish(again(manifest(bench, version), merged(version)))
        bench.now += 2 * retention.GRACE_S
        bench.store.collect(JOB)
        assert bench.numbers() == [*range(version, max(0, version - 2), -1), 0]
        assert bench.tensors(0) == tuple(base_tensors())
    # In full, twice: nobody needs it any more.
    for version in (9, 10):
        bench.publish(full_parcel(version, merged(version)))
    bench.store.collect(JOB)
    assert bench.numbers() == [10, 9]


def test_a_pinned_adapter_keeps_its_base(bench: Bench) -> None:
    bench.publish(adapter_parcel(1, JOB, KEY))
    bench.point("pin/x", 1)
    for version in (2, 3, 4):
        bench.publish(full_parcel(version, merged(version)))
    bench.store.collect(JOB)
    assert bench.numbers() == [4, 3, 1, 0]
    assert bench.tensors(1) == tuple(merged(1))


def test_upkeep_makes_no_deltas_beside_adapters_and_holds_the_base_alone(bench: Bench) -> None:
    upkeep = Upkeep(bench.store)
    for version in range(1, 10):
        bench.publish(adapter_parcel(version, JOB, KEY))
        upkeep.work(JOB, POLICY)
        kinds = [encoding.kind for encoding in bench.store.version(JOB, key(version))[1]]
        assert kinds == [weights_pb2.ENCODING_KIND_ADAPTER]
        assert bench.store.copies.held(JOB, POLICY) == {0}


def test_the_base_needs_no_room_beside_its_versions() -> None:
    size = sum(tensor_info(tensor).num_bytes for tensor in base_tensors())
    held: Copies[int] = Copies(2, size)
    infos = tuple(tensor_info(tensor) for tensor in base_tensors())
    base = HostCopy(infos, tuple(base_tensors()))
    held.put(0, base)
    for version in (1, 2, 3):
        held.put(version, HostCopy(infos, tuple(merged(version)), beside=True))
    assert held.keys() == [0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_version", None), ("base_version", 1), ("codec", DELTA), ("kind", weights_pb2.ENCODING_KIND_DELTA)],
)
def test_an_adapter_that_makes_no_sense_is_refused(bench: Bench, field: str, value: object) -> None:
    parcel = adapter_parcel(1, JOB, KEY)
    if value is None:
        parcel.header.encoding.ClearField(field)
    else:
        setattr(parcel.header.encoding, field, value)
    with pytest.raises(Rejected):
        bench.store.admit(parcel.header)


def test_an_adapter_of_what_is_not_there_or_of_another_model_is_refused(bench: Bench) -> None:
    with pytest.raises(NotFound, match="no version 3, the encoding's base: publish a full encoding"):
        bench.store.admit(adapter_parcel(5, JOB, KEY, base=3).header)
    bench.publish(full_parcel(3, base_tensors(seed=9)))
    with pytest.raises(IntegrityError, match="does not match its checksum"):
        bench.publish(adapter_parcel(5, JOB, KEY, base=3))
    bench.publish(full_parcel(6, base_tensors()[:2]))
    with pytest.raises(Rejected, match="other tensors"):
        bench.store.admit(adapter_parcel(7, JOB, KEY, base=6).header)
    assert bench.head() == 6


def test_a_lost_base_is_mended_by_a_later_learner_and_nothing_moves(bench: Bench) -> None:
    bench.publish(full_parcel(1, merged(1), epoch=2))
    (encoding,) = bench.store.version(JOB, key(0))[1]
    path = f"p/j/blobs/{encoding.sha256.hex()}"
    bench.objects.put(path, b"\0" * 10)
    bench.restarted()
    with pytest.raises(NotFound):
        bench.store.copies.get(JOB, key(0))
    mending = again(manifest(bench, 0), base_tensors())
    assert bench.publish(mending) is True
    assert bench.tensors(0) == tuple(base_tensors())
    assert bench.head() == 1
    # It changes nothing else: other weights of an older epoch are refused as ever.
    with pytest.raises(Fenced):
        bench.publish(full_parcel(2, merged(2)))


async def test_who_has_nothing_is_pushed_the_base_and_then_adapters(bench: Bench) -> None:
    for version in (1, 2):
        bench.publish(adapter_parcel(version, JOB, KEY))
    pushes = Pushes(bench.store, PointerHub(), JOB, "head", Wanted((), CODECS))
    stream = pushes.responses()
    told = []
    async with asyncio.timeout(10):
        while "head" not in told:
            response = await anext(stream)
            if response.HasField("push"):
                told.append([step.version for step in response.push.path])
            elif response.HasField("pointer"):
                told.append("head")
    assert told == [[0], [2], "head"]
    await stream.aclose()


async def test_the_base_is_not_forgotten_over_many_versions(bench: Bench) -> None:
    pushes = Pushes(bench.store, PointerHub(), JOB, "head", Wanted((0,), CODECS))
    for version in range(1, MAX_HELD + 9):
        pushes._hold(version, 0)
    assert 0 in pushes._held
    assert len(pushes._held) == MAX_HELD


def manifest(bench: Bench, version: int) -> weights_pb2.SignedManifest:
    return bench.store.version(JOB, key(version))[0]
