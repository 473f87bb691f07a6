from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

import pytest

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store.layout import VersionKey, version_of
from longshore.weight_store.objects import StoredObject
from longshore.weight_store.retention import GRACE_S, removable

JOB = JobRef("p", "j")
NOW = 1_000_000.0
OLD = NOW - GRACE_S - 1
POLICY, ADAPTER = weights_pb2.WEIGHT_SET_POLICY, weights_pb2.WEIGHT_SET_ADAPTER


def digest(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def thing(path: str, modified_at: float = OLD) -> StoredObject:
    return StoredObject(f"p/j/{path}", 1, modified_at)


def version(number: int, blob: object = None, weight_set: str = "policy") -> list[StoredObject]:
    """A version with one full encoding."""
    folder = f"versions/{weight_set}/{number:012d}"
    name = digest(number if blob is None else blob)
    return [thing(f"{folder}/manifest"), thing(f"{folder}/encodings/{name}"), thing(f"blobs/{name}")]


def full(sha256: str, size: int = 100) -> weights_pb2.Encoding:
    return weights_pb2.Encoding(
        kind=weights_pb2.ENCODING_KIND_FULL, sha256=bytes.fromhex(sha256), size=size, codec="safetensors"
    )


def catalog_of(listing: list[StoredObject]) -> dict[VersionKey, list[weights_pb2.Encoding]]:
    """The catalog of a listing in which every encoding is full."""
    keys = {item.path: key for item in listing if (key := version_of(JOB, item.path))}
    found: dict[VersionKey, list[weights_pb2.Encoding]] = {
        key: [] for path, key in keys.items() if path.endswith("/manifest")
    }
    for path, key in keys.items():
        if "/encodings/" in path and key in found:
            found[key].append(full(PurePosixPath(path).name))
    return found


def gone(listing: list[StoredObject], keep: int = 2, named: tuple[int, ...] = (), assets: str = "a") -> list[str]:
    pinned = {VersionKey(POLICY, number) for number in named}
    found = removable(JOB, listing, catalog_of(listing), keep, pinned, NOW, lambda _: assets)
    return [path.removeprefix("p/j/") for path in found]


def test_the_newest_and_the_named_stay() -> None:
    listing = [item for number in range(5) for item in version(number)]
    assert gone(listing, keep=2, named=(0,)) == [
        "versions/policy/000000000002/manifest",
        "versions/policy/000000000001/manifest",
        f"versions/policy/000000000001/encodings/{digest(1)}",
        f"versions/policy/000000000002/encodings/{digest(2)}",
        f"blobs/{digest(1)}",
        f"blobs/{digest(2)}",
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
        f"versions/policy/000000000000/encodings/{digest('same')}",
    ]


@pytest.mark.parametrize(("modified_at", "stays"), [(OLD, False), (NOW - 1, True)])
def test_leftovers_go_after_the_grace(modified_at: float, stays: bool) -> None:
    leftovers = [
        thing(f"versions/policy/000000000009/encodings/{digest('cut')}", modified_at),
        thing(f"blobs/{digest('cut')}", modified_at),
        thing("blobs/orphan", modified_at),
        thing("assets/orphan", modified_at),
    ]
    listing = [*version(0), thing("assets/a"), *leftovers]
    assert gone(listing) == ([] if stays else [item.path.removeprefix("p/j/") for item in leftovers])


def test_the_blob_of_a_publish_under_way_stays_even_when_old() -> None:
    """A fresh encoding says that someone is about to use it: only its manifest is missing."""
    listing = [*version(0), thing("versions/policy/000000000001/encodings/aa", NOW), thing("blobs/aa")]
    assert gone(listing) == []


def test_a_young_blob_of_a_retired_version_goes_at_once() -> None:
    listing = version(0) + version(1)
    listing[2] = thing(f"blobs/{digest(0)}", NOW)
    assert f"blobs/{digest(0)}" in gone(listing, keep=1)


def test_keys_pointers_and_the_like_stay() -> None:
    listing = [*version(0), thing("keys/0123456789abcdef"), thing("keep"), thing("pointers/pin/x"), thing("assets/b")]
    assert gone(listing) == []
