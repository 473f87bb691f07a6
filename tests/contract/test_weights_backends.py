"""The store's promises on each kind of object store: a folder, memory, and S3 (a real server on loopback)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import pytest
from s3_server import S3Server
from weight_parcels import JOB, Bench, delta_parcel, full_parcel, history, of_weight_set

from longshore.errors import Conflict
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.copies import Copies
from longshore.weight_store.decoding import CODECS, PLANES
from longshore.weight_store.layout import VersionKey, manifest_path
from longshore.weight_store.objects import Objects, open_objects
from longshore.weight_store.planner import path_kind
from longshore.weight_store.retention import GRACE_S
from longshore.weight_store.store import POLICY, VersionTaken, WeightStore
from longshore.weight_store.upkeep import Upkeep

TENSORS = history(20)
ADAPTER, VALUE = weights_pb2.WEIGHT_SET_ADAPTER, weights_pb2.WEIGHT_SET_VALUE
_numbers = itertools.count()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture(params=["folder", "memory", "s3"])
def objects(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Objects:
    if request.param == "folder":
        return open_objects(str(request.getfixturevalue("tmp_path")))
    if request.param == "memory":
        return open_objects("memory:///")
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    # A prefix of its own for each test.
    return open_objects(f"s3://{server.bucket}/store-{next(_numbers)}")


@pytest.fixture
def bench(objects: Objects) -> Bench:
    return Bench(objects, keep=3)


def publish_chain(bench: Bench, versions: range) -> None:
    for version in versions:
        if version == 0:
            bench.publish(full_parcel(0, TENSORS[0], codec=PLANES))
        else:
            bench.publish(delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1]))


def test_versions_come_back_after_a_restart(bench: Bench) -> None:
    publish_chain(bench, range(3))
    bench.restarted()
    assert (bench.head(), bench.numbers()) == (2, [2, 1, 0])
    publish_chain(bench, range(3, 4))
    assert bench.tensors(3) == tuple(TENSORS[3])
    assert bench.store.jobs() == [JOB]


def test_retention_leaves_every_kept_version_within_reach(bench: Bench) -> None:
    upkeep = Upkeep(bench.store)
    for version in range(12):
        publish_chain(bench, range(version, version + 1))
        upkeep.work(JOB, POLICY)
        bench.store.collect(JOB)
    bench.restarted()
    for version in (9, 10, 11):
        assert bench.tensors(version) == tuple(TENSORS[version])
    assert path_kind(bench.store.path(JOB, VersionKey(POLICY, 11), [3], CODECS)) == "merged"
    known = {item.sha256.hex() for number in bench.numbers() for item in bench.store.version(JOB, _key(number))[1]}
    blobs = {item.path.rpartition("/")[2] for item in bench.objects.list("p/j/blobs")}
    assert blobs == known


def test_a_number_is_given_once_even_between_two_processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process on one store is against the rules, but must not replace a version."""
    ours, theirs = full_parcel(0, TENSORS[0]), full_parcel(0, TENSORS[1])
    rival = WeightStore(bench.objects, clock=lambda: bench.now, copies=Copies(2, 10**9))
    admitted = rival.admit(theirs.header)
    bench.publish(ours)
    # The rival looks just before our manifest is there.
    monkeypatch.setattr(rival, "_is_there", lambda _: False)
    with pytest.raises(VersionTaken):
        rival.commit(admitted, io.BytesIO(b"".join(theirs.parts)))
    assert bench.store.version(JOB, _key(0))[0] == ours.header.manifest


def test_a_manifest_whose_answer_was_lost_counts_as_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a remote store's client does by itself: it repeats the request, and meets what it wrote."""
    create = Objects.create

    def twice(self: Objects, path: str, data: bytes) -> None:
        create(self, path, data)
        create(self, path, data)

    monkeypatch.setattr(Objects, "create", twice)
    publish_chain(bench, range(2))
    assert (bench.head(), bench.numbers()) == (1, [1, 0])
    with pytest.raises(Conflict):
        bench.objects.create(manifest_path(JOB, _key(0)), b"")


def test_weight_sets_have_numbers_of_their_own(bench: Bench) -> None:
    publish_chain(bench, range(2))
    for number, weight_set in ((0, ADAPTER), (7, ADAPTER), (0, VALUE)):
        bench.publish(of_weight_set(full_parcel(number, TENSORS[10 + number]), weight_set))
    bench.publish(of_weight_set(delta_parcel(8, TENSORS[18], 7, TENSORS[17]), ADAPTER))
    bench.restarted()
    assert bench.numbers() == [1, 0]
    assert bench.numbers(ADAPTER) == [8, 7, 0]
    assert bench.numbers(VALUE) == [0]
    for weight_set, number in ((POLICY, 0), (ADAPTER, 0), (VALUE, 0), (ADAPTER, 8)):
        expected = TENSORS[number] if weight_set == POLICY else TENSORS[10 + number]
        assert bench.store.copies.get(JOB, VersionKey(weight_set, number)).tensors == tuple(expected)
    assert bench.head() == 1


def test_leftovers_go_after_the_grace(bench: Bench) -> None:
    publish_chain(bench, range(2))
    cut = delta_parcel(2, TENSORS[2], 1, TENSORS[1])
    admitted = bench.store.admit(cut.header)
    bench.store._write_parts(admitted, io.BytesIO(cut.parts[0]), existed=False)
    before = len(bench.objects.list("p/j"))
    bench.now = max(item.modified_at for item in bench.objects.list("p/j")) + 1
    bench.restarted()
    assert bench.store.collect(JOB) == 0
    bench.now += GRACE_S
    assert bench.store.collect(JOB) == 2
    assert len(bench.objects.list("p/j")) == before - 2
    bench.publish(cut)
    assert bench.tensors(2) == tuple(TENSORS[2])


async def test_a_store_on_s3_serves_learners_and_generators(stopped_weights, s3: S3Server, monkeypatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    weights = stopped_weights
    weights.store_url = f"s3://{s3.bucket}/served"
    await weights.start()
    client = weights.client()
    await client.register_key(keep=2)
    for version in range(4):
        await weights.publish(client, version, size=100_000)
    assert (await client.versions())[:2] == [3, 2]
    policy = await weights.client().fetch(3)
    assert policy.tensors == tuple(weights.tensors(3, 100_000))
    assert await weights.client().assets(policy.assets_sha256) == weights.assets
    await weights.stop()
    await weights.start()
    assert await weights.client().head() == 3
    assert await weights.publish(client, 3, size=100_000) is True


def _key(version: int) -> VersionKey:
    return VersionKey(POLICY, version)
