"""Delta publishes, encodings added later, and paths, on a memory store."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
from weight_parcels import JOB, Bench, delta_parcel, encoding_of, full_parcel, history

from longshore.errors import IntegrityError, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.codec import delta, planes
from longshore.weight_store.decoding import CODECS, DELTA, PLANES, SAFETENSORS
from longshore.weight_store.layout import VersionKey, blob_path
from longshore.weight_store.objects import open_objects
from longshore.weight_store.planner import path_kind
from longshore.weight_store.store import POLICY

TENSORS = history(10)


@pytest.fixture
def bench() -> Bench:
    return Bench(keep=8)


def publish_chain(bench: Bench, last: int, codec: str = SAFETENSORS) -> None:
    """Version 0 in full, the others as deltas."""
    bench.publish(full_parcel(0, TENSORS[0], codec=codec))
    for version in range(1, last + 1):
        bench.publish(delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1]))


def kind(bench: Bench, want: int, have: tuple[int, ...] = (), codecs: tuple[str, ...] = CODECS) -> str:
    return path_kind(bench.store.path(JOB, VersionKey(POLICY, want), have, codecs))


@pytest.mark.parametrize("codec", [SAFETENSORS, PLANES])
def test_a_chain_of_deltas_is_read_back_by_a_newcomer(bench: Bench, codec: str) -> None:
    publish_chain(bench, 3, codec)
    assert (bench.head(), bench.numbers()) == (3, [3, 2, 1, 0])
    for version in range(4):
        assert bench.tensors(version) == tuple(TENSORS[version])


def test_a_restarted_store_rebuilds_the_base_from_the_anchor(bench: Bench) -> None:
    publish_chain(bench, 3)
    bench.restarted()
    bench.publish(delta_parcel(4, TENSORS[4], 3, TENSORS[3]))
    assert bench.tensors(4) == tuple(TENSORS[4])


def test_tensors_that_did_not_change_are_shared_between_copies(bench: Bench) -> None:
    publish_chain(bench, 1)
    first, second = (bench.store.copies.get(JOB, VersionKey(POLICY, version)) for version in (0, 1))
    assert first.tensors[1] is second.tensors[1]
    assert first.tensors[0] != second.tensors[0]


def test_a_delta_whose_result_is_not_the_manifests_is_refused(bench: Bench) -> None:
    publish_chain(bench, 1)
    wrong = delta_parcel(2, TENSORS[2], 1, TENSORS[1])
    payload = delta.encode(TENSORS[1], TENSORS[5])
    wrong.header.encoding.CopyFrom(encoding_of(payload, DELTA, 1))
    with pytest.raises(IntegrityError, match="tensor w"):
        bench.store.commit(bench.store.admit(wrong.header), io.BytesIO(payload))
    from_wrong_base = delta_parcel(2, TENSORS[2], 1, TENSORS[0])
    with pytest.raises(IntegrityError, match="tensor w"):
        bench.publish(from_wrong_base)
    assert (bench.head(), bench.numbers()) == (1, [1, 0])


def test_a_damaged_payload_is_refused_before_it_is_decoded(bench: Bench) -> None:
    publish_chain(bench, 1)
    good = delta_parcel(2, TENSORS[2], 1, TENSORS[1])
    sent = good.parts[0]
    for spoiled in (sent[:-1], sent[:-1] + bytes([sent[-1] ^ 1])):
        with pytest.raises(IntegrityError):
            bench.store.commit(bench.store.admit(good.header), io.BytesIO(spoiled))
    bench.publish(good)


def test_without_its_base_a_delta_is_not_taken(bench: Bench) -> None:
    publish_chain(bench, 1)
    with pytest.raises(NotFound, match=r"version 4.*publish a full encoding"):
        bench.store.admit(delta_parcel(5, TENSORS[5], 4, TENSORS[4]).header)
    bench.publish(full_parcel(5, TENSORS[5]))


def test_a_base_that_cannot_be_decoded_asks_for_a_full_publish(tmp_path: Path) -> None:
    bench = Bench(open_objects(str(tmp_path)), keep=8)
    publish_chain(bench, 2)
    single = bench.store.path(JOB, VersionKey(POLICY, 1), [0], CODECS)[0].encoding
    bench.objects.put(blob_path(JOB, single.sha256), b"rubbish")
    bench.restarted()
    with pytest.raises(NotFound, match="no sound way"):
        bench.publish(delta_parcel(3, TENSORS[3], 2, TENSORS[2]))
    # The damaged encoding is not offered any more, and a full publish mends the job.
    assert kind(bench, 1) == kind(bench, 2) == "unreachable"
    bench.publish(full_parcel(3, TENSORS[3]))
    bench.publish(delta_parcel(4, TENSORS[4], 3, TENSORS[3]))
    assert bench.tensors(4) == tuple(TENSORS[4])


def test_a_damaged_encoding_is_gone_round_where_there_is_another_way(bench: Bench) -> None:
    publish_chain(bench, 3)
    whole = planes.encode(TENSORS[3])
    assert bench.store.add_encoding(JOB, VersionKey(POLICY, 3), encoding_of(whole, PLANES), whole) is True
    single = bench.store.path(JOB, VersionKey(POLICY, 2), [1], CODECS)[0].encoding
    bench.objects.delete(blob_path(JOB, single.sha256))
    bench.restarted()
    assert bench.store.copies.get(JOB, VersionKey(POLICY, 3)).tensors == tuple(TENSORS[3])
    with pytest.raises(NotFound):
        bench.store.copies.get(JOB, VersionKey(POLICY, 2))


def test_copies_stay_within_their_memory(bench: Bench) -> None:
    publish_chain(bench, 1)
    small = bench.restarted(copy_bytes=100)
    with pytest.raises(NotFound, match="LONGSHORE_HOST_COPIES_MB"):
        small.copies.get(JOB, VersionKey(POLICY, 1))
    with pytest.raises(NotFound, match="full encodings"):
        bench.publish(delta_parcel(2, TENSORS[2], 1, TENSORS[1]))
    bench.publish(full_parcel(2, TENSORS[2]))


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "zip"},
        {"codec": SAFETENSORS},
        {"kind": weights_pb2.ENCODING_KIND_FULL},
        {"kind": weights_pb2.ENCODING_KIND_UNSPECIFIED},
        {"base_version": 2},
        {"base_version": 7},
        {"base_version": None},
        {"size": 2**40},
        {"sha256": b"short"},
    ],
)
def test_an_encoding_must_make_sense(bench: Bench, change: dict[str, object]) -> None:
    publish_chain(bench, 1)
    header = delta_parcel(2, TENSORS[2], 1, TENSORS[1]).header
    for field, value in change.items():
        if value is None:
            header.encoding.ClearField(field)
        else:
            setattr(header.encoding, field, value)
    with pytest.raises(Rejected):
        bench.store.admit(header)


def test_a_base_with_other_tensors_is_refused(bench: Bench) -> None:
    publish_chain(bench, 1)
    other = history(1, size=80)[0]
    header = full_parcel(2, other).header
    header.encoding.CopyFrom(delta_parcel(2, TENSORS[2], 1, TENSORS[1]).header.encoding)
    with pytest.raises(Rejected, match="other tensors"):
        bench.store.admit(header)


def test_an_encoding_added_later_must_decode_to_the_version(bench: Bench) -> None:
    publish_chain(bench, 4)
    key = VersionKey(POLICY, 4)
    merged = delta.encode(TENSORS[0], TENSORS[4])
    assert bench.store.add_encoding(JOB, key, encoding_of(merged, DELTA, 0, merged=True), merged) is True
    assert bench.store.add_encoding(JOB, key, encoding_of(merged, DELTA, 0, merged=True), merged) is False
    assert kind(bench, 4, have=(0,)) == "merged"
    bench.restarted()
    assert kind(bench, 4, have=(0,)) == "merged"
    wrong = delta.encode(TENSORS[0], TENSORS[3])
    with pytest.raises(IntegrityError, match="tensor w"):
        bench.store.add_encoding(JOB, key, encoding_of(wrong, DELTA, 0), wrong)
    with pytest.raises(IntegrityError, match="SHA-256"):
        bench.store.add_encoding(JOB, key, encoding_of(merged, DELTA, 0), merged + b"x")
    with pytest.raises(NotFound):
        bench.store.add_encoding(JOB, VersionKey(POLICY, 9), encoding_of(merged, DELTA, 0), merged)
    assert len(bench.store.version(JOB, key)[1]) == 2


def test_a_path_uses_what_the_receiver_has_and_can_decode(bench: Bench) -> None:
    publish_chain(bench, 3)
    assert kind(bench, 3) == "anchored"
    assert kind(bench, 3, have=(2,)) == "delta"
    assert kind(bench, 3, have=(1,)) == "deltas"
    assert kind(bench, 3, have=(3,)) == "nothing"
    assert kind(bench, 3, codecs=()) == "unreachable"
    assert kind(bench, 0, codecs=()) == "full"
    assert kind(bench, 9) == "unreachable"


def test_a_repeated_delta_mends_a_damaged_blob_without_its_base(bench: Bench) -> None:
    publish_chain(bench, 2)
    sent = delta_parcel(2, TENSORS[2], 1, TENSORS[1])
    path = blob_path(JOB, sent.header.encoding.sha256)
    bench.objects.put(path, b"rubbish")
    bench.restarted(copy_bytes=100)
    assert bench.publish(sent) is True
    assert hashlib.sha256(bench.objects.get(path)).digest() == sent.header.encoding.sha256


def test_a_version_published_again_in_full_gains_an_encoding(bench: Bench) -> None:
    publish_chain(bench, 2)
    assert bench.publish(full_parcel(2, TENSORS[2])) is True
    assert len(bench.store.version(JOB, VersionKey(POLICY, 2))[1]) == 2
    assert kind(bench, 2) == "full"
