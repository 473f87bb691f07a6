"""Names that move: forth, back, and not where they must not."""

from __future__ import annotations

import pytest
from weight_parcels import JOB, KEY, Bench, full_parcel, history

from longshore.errors import Conflict, Fenced, NotFound, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.layout import VersionKey, manifest_path, pointer_path
from longshore.weight_store.objects import Objects, StorageFull, open_objects
from longshore.weight_store.pointers import MAX_SERIAL
from longshore.weight_store.store import POLICY
from longshore.weight_store.version import sign_manifest, sign_pointer

TENSORS = history(6)
NAMES = ("head", "serving", "channel/stable", "pin/best")


@pytest.fixture
def bench() -> Bench:
    bench = Bench(keep=8)
    for version in range(4):
        bench.publish(full_parcel(version, TENSORS[version]))
    return bench


def named(bench: Bench, name: str) -> int | None:
    state = bench.store.pointer(JOB, name)
    return state[0].version if state else None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_moves_forth_and_back_while_its_serial_grows(bench: Bench, name: str) -> None:
    for serial, version in enumerate((2, 0, 3, 1), start=100):
        bench.point(name, version, serial=serial)
        assert named(bench, name) == version
    bench.restarted()
    assert named(bench, name) == 1
    # Numbers go on above the highest, wherever head is.
    bench.publish(full_parcel(4, TENSORS[4], serial=200))
    assert bench.head() == 4
    assert bench.numbers() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_once_signed_cannot_be_replayed(bench: Bench, name: str) -> None:
    first = sign_pointer(KEY, JOB, name, 1, 100, 2e9)
    bench.store.set_pointer(first)
    bench.point(name, 2, serial=101)
    for _ in range(2):
        with pytest.raises(Conflict):
            bench.store.set_pointer(first)
        bench.restarted()
    assert named(bench, name) == 2


def test_a_replay_is_refused_after_its_version_and_its_term_are_gone(bench: Bench) -> None:
    old = sign_pointer(KEY, JOB, "pin/best", 0, 1, 2e9)
    bench.store.set_pointer(old)
    bench.point("pin/best", 1, serial=2, expires_at=1_500.0)
    bench.now = 1_600.0
    with pytest.raises(Conflict):
        bench.store.set_pointer(old)


def test_a_renewal_keeps_the_version_and_needs_a_higher_serial(bench: Bench) -> None:
    bench.point("pin/best", 1, serial=1, expires_at=1_500.0)
    with pytest.raises(Conflict):
        bench.point("pin/best", 1, serial=1, expires_at=9_000.0)
    bench.point("pin/best", 1, serial=2, expires_at=9_000.0)
    bench.now = 2_000.0
    bench.store.register_key(JOB, KEY.public_key, keep=1)
    bench.store.collect(JOB)
    assert bench.numbers() == [3, 1]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_cannot_lead_to_a_version_that_is_not_there(bench: Bench, name: str) -> None:
    with pytest.raises(NotFound, match="no version 9"):
        bench.point(name, 9, serial=100)
    # Nor to one of another weight set.
    assert named(bench, name) == (3 if name == "head" else None)


def test_a_serial_that_leaves_no_room_above_it_is_refused(bench: Bench) -> None:
    with pytest.raises(Rejected, match="serial"):
        bench.point("head", 0, serial=MAX_SERIAL + 1)
    with pytest.raises(Rejected, match="serial"):
        bench.publish(full_parcel(4, TENSORS[4], serial=2**64 - 1))
    bench.publish(full_parcel(4, TENSORS[4], serial=MAX_SERIAL - 1))
    bench.publish(full_parcel(5, TENSORS[5], serial=MAX_SERIAL))


def test_an_expired_pointer_is_refused_and_says_by_how_much(bench: Bench) -> None:
    with pytest.raises(Rejected, match="expired 400 s ago by the store's clock"):
        bench.point("serving", 1, expires_at=600.0)


def test_a_publishers_clock_that_is_behind_or_ahead_does_not_hold_up_the_job(bench: Bench) -> None:
    """The serials of one whose clock is ahead are the base of whoever follows; times in manifests mean nothing."""
    ahead = full_parcel(4, TENSORS[4], serial=10**15)
    bench.publish(ahead)
    with pytest.raises(Fenced):
        bench.publish(full_parcel(5, TENSORS[5], serial=5_000))
    bench.publish(full_parcel(5, TENSORS[5], serial=10**15 + 1))
    assert bench.head() == 5
    # One whose clock is behind by more than a head lasts is told so, and leaves nothing behind.
    late = full_parcel(6, TENSORS[0], serial=10**15 + 2)
    late.header.head.CopyFrom(sign_pointer(KEY, JOB, "head", 6, 10**15 + 2, bench.now - 1))
    before = {item.path for item in bench.objects.list("p/j")}
    with pytest.raises(Rejected, match="clock"):
        bench.publish(late)
    assert {item.path for item in bench.objects.list("p/j")} == before
    bench.publish(full_parcel(6, TENSORS[0], serial=10**15 + 2))
    assert bench.head() == 6


def test_a_head_that_a_crash_left_undone_is_finished_though_a_higher_number_exists(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer learner went back to an earlier number that was free."""
    bench.publish(full_parcel(9, TENSORS[4], serial=10))
    put = Objects.put

    def dying(self: Objects, path: str, data: object) -> None:
        if path == pointer_path(JOB, "head"):
            raise StorageFull("no room")
        put(self, path, data)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Objects, "put", dying)
        with pytest.raises(StorageFull):
            bench.publish(full_parcel(6, TENSORS[5], serial=11, epoch=2))
    bench.restarted()
    assert bench.head() == 6


def test_an_older_version_written_again_does_not_set_head_back(bench: Bench) -> None:
    """Repair looks at the manifests that were written last, and head's serial only grows."""
    path = manifest_path(JOB, VersionKey(POLICY, 1))
    bench.objects.put(path, bench.objects.get(path))
    bench.restarted()
    assert bench.head() == 3


def test_a_head_names_a_policy_and_no_other_weight_set() -> None:
    bench = Bench(open_objects("memory:///"))
    parcel = full_parcel(0, TENSORS[0])
    manifest = weights_pb2.Manifest.FromString(parcel.header.manifest.manifest)
    manifest.weight_set = weights_pb2.WEIGHT_SET_ADAPTER
    parcel.header.manifest.CopyFrom(sign_manifest(KEY, manifest))
    with pytest.raises(Rejected, match="head"):
        bench.publish(parcel)
