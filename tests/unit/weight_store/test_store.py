"""The store's rules without a network, on a memory store and a clock of our own."""

from __future__ import annotations

import io

import pytest
from weight_parcels import JOB, KEY, Bench, full_parcel

from longshore.errors import Conflict, Fenced, IntegrityError, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store.layout import VersionKey, blob_path, pointer_path
from longshore.weight_store.objects import open_objects
from longshore.weight_store.payload import Tensor
from longshore.weight_store.store import POLICY, WeightStore
from longshore.weight_store.version import VersionDraft, build_manifest, sign_manifest, sign_pointer, tensor_infos
from longshore.weights.parcel import Parcel


@pytest.fixture
def bench() -> Bench:
    return Bench()


def parcel(version: int, serial: int | None = None, epoch: int = 1, seed: int | None = None) -> Parcel:
    data = bytes([version if seed is None else seed] * 8)
    return full_parcel(version, [Tensor("w", "float32", (2,), data)], serial=serial, epoch=epoch)


def test_an_interrupted_head_is_finished_after_a_restart(bench: Bench) -> None:
    bench.publish(parcel(0))
    before = bench.objects.get(pointer_path(JOB, "head"))
    bench.publish(parcel(1))
    bench.objects.put(pointer_path(JOB, "head"), before)
    bench.restarted()
    assert bench.head() == 1


def test_a_rollback_survives_a_restart(bench: Bench) -> None:
    bench.publish(parcel(0))
    bench.publish(parcel(1))
    bench.point("head", 0, 2e9, serial=50)
    bench.restarted()
    assert bench.head() == 0


def test_head_counts_for_fencing_when_it_was_rolled_back_to_a_newer_epoch(bench: Bench) -> None:
    bench.publish(parcel(5, epoch=1))
    bench.publish(parcel(3, serial=6, epoch=2))
    with pytest.raises(Fenced):
        bench.publish(parcel(6, serial=7, epoch=1))
    bench.publish(parcel(6, serial=8, epoch=2))
    assert bench.head() == 6


def test_what_happens_between_header_and_payload_is_seen(bench: Bench) -> None:
    slow = parcel(0, epoch=1)
    admitted = bench.store.admit(slow.header)
    bench.publish(parcel(0, epoch=2, seed=9))
    with pytest.raises(Fenced):
        bench.store.commit(admitted, io.BytesIO(b"".join(slow.parts)))


def test_encodings_of_a_publish_that_was_cut_off_are_not_offered(bench: Bench) -> None:
    cut, done = parcel(0, seed=1), parcel(0, seed=2)
    admitted = bench.store.admit(cut.header)
    bench.store._write_parts(admitted, io.BytesIO(b"".join(cut.parts)), existed=False)
    with pytest.raises(NotFound):
        bench.store.version(JOB, VersionKey(POLICY, 0))
    bench.publish(done)
    _, encodings = bench.store.version(JOB, VersionKey(POLICY, 0))
    assert [item.sha256 for item in encodings] == [done.header.encoding.sha256]


def test_a_pin_holds_its_version_until_it_expires(bench: Bench) -> None:
    bench.publish(parcel(0))
    bench.point("pin/best", 0, expires_at=2_000.0)
    for number in range(1, 5):
        bench.publish(parcel(number))
    bench.store.collect(JOB)
    assert bench.numbers() == [4, 3, 0]
    bench.now = 2_001.0
    bench.store.collect(JOB)
    assert bench.numbers() == [4, 3]


def test_serving_and_head_hold_their_versions_for_ever(bench: Bench) -> None:
    for number in range(5):
        bench.publish(parcel(number))
    bench.point("serving", 1, expires_at=2_000.0)
    bench.point("head", 0, expires_at=2_000.0, serial=99)
    bench.now = 3_000.0
    bench.store.collect(JOB)
    assert bench.numbers() == [4, 3, 1, 0]


def test_the_registered_number_is_kept(bench: Bench) -> None:
    bench.store.register_key(JOB, KEY.public_key, keep=1)
    for number in range(3):
        bench.publish(parcel(number))
    bench.store.collect(JOB)
    assert bench.numbers() == [2]


def test_versions_are_listed_newest_first_in_pages(bench: Bench) -> None:
    for number in (1, 9, 10, 11):
        bench.publish(parcel(number))
    assert bench.store.versions(JOB, POLICY, None, 2) == [11, 10]
    assert bench.store.versions(JOB, POLICY, 10, 2) == [9, 1]


def test_a_pointer_of_another_job_is_refused(bench: Bench) -> None:
    other = JobRef("p", "other")
    bench.store.register_key(other, SigningKey.generate().public_key, keep=1)
    bench.publish(parcel(0))
    with pytest.raises(IntegrityError):
        bench.store.set_pointer(sign_pointer(KEY, other, "head", 0, 100, 2e9))
    crossed = parcel(1)
    crossed.header.head.CopyFrom(sign_pointer(KEY, JOB, "head", 0, 100, 2e9))
    with pytest.raises(Rejected):
        bench.store.admit(crossed.header)


def test_a_job_without_a_key_takes_nothing(bench: Bench) -> None:
    store = WeightStore(open_objects("memory:///"))
    with pytest.raises(IntegrityError, match="not a registered key"):
        store.admit(parcel(0).header)


def test_a_jobs_key_is_not_replaced(bench: Bench) -> None:
    with pytest.raises(Conflict):
        bench.store.register_key(JOB, SigningKey.generate().public_key, keep=2)
    bench.publish(parcel(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("version", 10**12),
        ("weight_set", 0),
        ("layout_sha256", b"\0" * 32),
        ("assets_sha256", b""),
    ],
)
def test_a_signed_manifest_must_still_make_sense(bench: Bench, field: str, value: object) -> None:
    header = parcel(0).header
    manifest = weights_pb2.Manifest.FromString(header.manifest.manifest)
    setattr(manifest, field, value)
    header.manifest.CopyFrom(sign_manifest(KEY, manifest))
    header.ClearField("head")
    with pytest.raises(Rejected):
        bench.store.admit(header)


def test_manifest_tensors_must_be_sound() -> None:
    header = parcel(0).header
    infos = tensor_infos(weights_pb2.Manifest.FromString(header.manifest.manifest))
    draft = VersionDraft(0, 0, 1, None, (), 1.0)
    for wrong in ([], [*infos, *infos]):
        with pytest.raises(ValueError, match="needs tensors"):
            build_manifest(JOB, draft, wrong, b"\0" * 32)


def test_find_knows_blobs_and_assets_only(bench: Bench) -> None:
    sent = parcel(0)
    bench.publish(sent)
    assert bench.store.find(JOB, sent.header.encoding.sha256)[0] == blob_path(JOB, sent.header.encoding.sha256)
    assert bench.store.find(JOB, sent.assets_sha256)[1] == len(sent.header.assets)
    with pytest.raises(NotFound):
        bench.store.find(JOB, b"\0" * 32)
    with pytest.raises(Rejected):
        bench.store.find(JOB, b"../../keep")
