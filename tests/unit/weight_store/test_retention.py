from __future__ import annotations

import pytest

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StoredObject
from longshore.weight_store.retention import GRACE_S, removable

JOB = JobRef("p", "j")
NOW = 1_000_000.0
OLD = NOW - GRACE_S - 1
POLICY, ADAPTER = weights_pb2.WEIGHT_SET_POLICY, weights_pb2.WEIGHT_SET_ADAPTER


def thing(path: str, modified_at: float = OLD) -> StoredObject:
    return StoredObject(f"p/j/{path}", 1, modified_at)


def version(number: int, blob: str | None = None, weight_set: str = "policy") -> list[StoredObject]:
    folder = f"versions/{weight_set}/{number:012d}"
    blob = blob or f"blob{number}"
    return [thing(f"{folder}/manifest"), thing(f"{folder}/encodings/{blob}"), thing(f"blobs/{blob}")]


def gone(listing: list[StoredObject], keep: int = 2, named: tuple[int, ...] = (), assets: str = "a") -> list[str]:
    found = removable(JOB, listing, keep, {VersionKey(POLICY, number) for number in named}, NOW, lambda _: assets)
    return [path.removeprefix("p/j/") for path in found]


def test_the_newest_and_the_named_stay() -> None:
    listing = [item for number in range(5) for item in version(number)]
    assert gone(listing, keep=2, named=(0,)) == [
        "versions/policy/000000000001/manifest",
        "versions/policy/000000000002/manifest",
        "versions/policy/000000000001/encodings/blob1",
        "versions/policy/000000000002/encodings/blob2",
        "blobs/blob1",
        "blobs/blob2",
    ]


def test_nothing_goes_while_there_are_few() -> None:
    assert gone([item for number in range(2) for item in version(number)]) == []


def test_weight_sets_are_counted_apart() -> None:
    listing = version(7) + version(8) + version(1, "x", "adapter") + version(2, "y", "adapter")
    assert gone(listing) == []


def test_a_blob_that_a_kept_version_shares_stays() -> None:
    listing = version(0, "same") + version(1, "same")
    assert gone(listing, keep=1) == [
        "versions/policy/000000000000/manifest",
        "versions/policy/000000000000/encodings/same",
    ]


@pytest.mark.parametrize(("modified_at", "stays"), [(OLD, False), (NOW - 1, True)])
def test_leftovers_go_after_the_grace(modified_at: float, stays: bool) -> None:
    leftovers = [
        thing("versions/policy/000000000009/encodings/cut", modified_at),
        thing("blobs/cut", modified_at),
        thing("blobs/orphan", modified_at),
        thing("assets/orphan", modified_at),
    ]
    listing = [*version(0), thing("assets/a"), *leftovers]
    assert gone(listing) == ([] if stays else [item.path.removeprefix("p/j/") for item in leftovers])


def test_the_blob_of_a_publish_under_way_stays_even_when_old() -> None:
    """A fresh encoding says that someone is about to use it: only its manifest is missing."""
    listing = [*version(0), thing("versions/policy/000000000001/encodings/slow", NOW), thing("blobs/slow")]
    assert gone(listing) == []


def test_a_young_blob_of_a_retired_version_goes_at_once() -> None:
    listing = version(0) + version(1)
    listing[2] = thing("blobs/blob0", NOW)
    assert "blobs/blob0" in gone(listing, keep=1)


def test_keys_pointers_and_the_like_stay() -> None:
    listing = [*version(0), thing("keys/0123456789abcdef"), thing("keep"), thing("pointers/pin/x"), thing("assets/b")]
    assert gone(listing) == []
