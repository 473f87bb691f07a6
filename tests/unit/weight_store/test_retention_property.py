"""Any history of publishes, added encodings, pins and retention runs: what is kept stays within reach."""

from __future__ import annotations

import hashlib
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.proto.v1 import weights_pb2
from longshore.types import JobRef
from longshore.weight_store import layout
from longshore.weight_store.decoding import CODECS, DELTA, DELTA_KINDS, PLANES
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import StoredObject
from longshore.weight_store.planner import cheapest_path, reachable
from longshore.weight_store.retention import GRACE_S, RECENT, removable

JOB = JobRef("p", "j")
POLICY, ADAPTER = weights_pb2.WEIGHT_SET_POLICY, weights_pb2.WEIGHT_SET_ADAPTER
NOW = 10**6


class World:
    """What a job has in its object store, without the bytes."""

    def __init__(self) -> None:
        self.encodings: dict[VersionKey, list[weights_pb2.Encoding]] = {}
        self.objects: set[str] = set()
        self.pins: set[int] = set()
        self._count = itertools.count()

    def add(self, key: VersionKey, size: int, base: int | None = None, merged: bool = False) -> None:
        """An encoding of a version, which begins to exist with its first."""
        delta_kind = DELTA_KINDS[merged]
        encoding = weights_pb2.Encoding(
            kind=weights_pb2.ENCODING_KIND_FULL if base is None else delta_kind,
            base_version=base,
            size=size,
            codec=PLANES if base is None else DELTA,
            sha256=hashlib.sha256(str(next(self._count)).encode()).digest(),
        )
        self.encodings.setdefault(key, []).append(encoding)
        self.objects |= {
            layout.manifest_path(JOB, key),
            layout.encoding_path(JOB, key, encoding.sha256),
            layout.blob_path(JOB, encoding.sha256),
        }

    def numbers(self, weight_set: int = POLICY) -> list[int]:
        return sorted((key.version for key in self.encodings if key.weight_set == weight_set), reverse=True)

    def of(self, weight_set: int = POLICY) -> dict[int, list[weights_pb2.Encoding]]:
        return {key.version: items for key, items in self.encodings.items() if key.weight_set == weight_set}

    def kept(self, keep: int) -> set[int]:
        return {*self.numbers()[:keep], *(pin for pin in self.pins if pin in self.numbers())}

    def removable(self, keep: int, now: float = NOW) -> list[str]:
        named = {VersionKey(POLICY, pin) for pin in self.pins}
        listing = [StoredObject(path, 1, NOW - 1) for path in sorted(self.objects)]
        return removable(JOB, listing, self.encodings, keep, named, now, lambda _: "")

    def remove(self, paths: list[str]) -> None:
        self.objects -= set(paths)
        self.encodings = {
            key: [item for item in items if layout.encoding_path(JOB, key, item.sha256) in self.objects]
            for key, items in self.encodings.items()
            if layout.manifest_path(JOB, key) in self.objects
        }


@st.composite
def operations(draw):
    sizes = st.integers(1, 40)
    action = st.one_of(
        st.tuples(st.just("full"), st.integers(50, 100)),
        # How many versions on hand lie between a delta and its base.
        st.tuples(st.just("delta"), sizes, st.integers(0, 3)),
        st.tuples(st.just("delta"), sizes, st.just(0)),
        st.tuples(st.just("merged"), sizes, st.integers(1, 9)),
        st.tuples(st.just("anchor"), st.integers(50, 100)),
        st.tuples(st.just("adapter"), sizes),
        st.tuples(st.just("pin"), st.integers(0, 9)),
        st.tuples(st.just("unpin"), st.integers(0, 9)),
        st.tuples(st.just("collect"), st.floats(0, 1)),
    )
    return draw(st.lists(action, max_size=60))


def apply(world: World, operation: tuple) -> None:
    name, *details = operation
    numbers = world.numbers()
    newest = numbers[0] if numbers else -1
    key = VersionKey(POLICY, newest + 1)
    if name == "full" or (name == "delta" and not numbers):
        world.add(key, details[0])
    elif name == "delta":
        world.add(key, details[0], base=numbers[min(details[1], len(numbers) - 1)])
    elif name == "merged" and details[1] < len(numbers):
        world.add(VersionKey(POLICY, newest), details[0], base=numbers[details[1]], merged=True)
    elif name == "anchor" and numbers:
        world.add(VersionKey(POLICY, newest), details[0])
    elif name == "adapter":
        others = world.numbers(ADAPTER)
        world.add(VersionKey(ADAPTER, others[0] + 1 if others else 0), details[0], others[0] if others else None)
    elif name in ("pin", "unpin") and details[0] < len(numbers):
        # A pin names a version that can be reached: history alone is not offered.
        if name == "pin" and numbers[details[0]] in reachable(world.of(), CODECS):
            world.pins.add(numbers[details[0]])
        else:
            world.pins.discard(numbers[details[0]])


@settings(max_examples=200, deadline=None)
@given(operations(), st.integers(1, 4))
def test_every_kept_version_stays_within_reach_even_if_retention_is_cut_off(history, keep: int) -> None:
    world = World()
    for operation in [*history, ("collect", 1.0)]:
        if operation[0] != "collect":
            apply(world, operation)
            continue
        before = reachable(world.of(), CODECS)
        kept = world.kept(keep) & before
        adapters = set(world.numbers(ADAPTER)[:keep])
        gone = world.removable(keep)
        retired = {key.version for path in gone if (key := _manifest(path)) and key.weight_set == POLICY}
        # A crash after any number of removals; the next run does the rest.
        cut = int(len(gone) * operation[1])
        for path in gone[:cut]:
            world.remove([path])
            after = reachable(world.of(), CODECS)
            assert kept | (retired & set(world.numbers()) & before) <= after
        assert adapters <= reachable(world.of(ADAPTER), CODECS)
        world.remove(world.removable(keep))
        assert kept <= reachable(world.of(), CODECS)
        assert world.removable(keep) == []


@settings(max_examples=100, deadline=None)
@given(operations(), st.integers(1, 4))
def test_what_is_left_is_of_use(history, keep: int) -> None:
    """After retention and the grace every object belongs to a version, and each version is kept, led through, or past
    that receivers may still have."""
    world = World()
    for operation in history:
        apply(world, operation)
    world.remove(world.removable(keep, now=NOW + GRACE_S + 1))
    blobs = {path for path in world.objects if "/blobs/" in path}
    known = {layout.blob_path(JOB, item.sha256) for items in world.encodings.values() for item in items}
    assert blobs == known
    encodings, kept = world.of(), world.kept(keep)
    through = {
        (step.version, step.encoding.sha256)
        for version in kept
        for step in cheapest_path(encodings, (), version, CODECS) or ()
    }
    recent = set(world.numbers()[:RECENT])
    for version, items in encodings.items():
        for item in items:
            assert (
                (version in kept and (item.kind != weights_pb2.ENCODING_KIND_MERGED_DELTA or version in recent))
                or (version, item.sha256) in through
                or item.kind == weights_pb2.ENCODING_KIND_DELTA
            )


def test_merged_deltas_of_older_versions_go_first() -> None:
    world = World()
    world.add(VersionKey(POLICY, 0), 1000)
    for version in range(1, 30):
        world.add(VersionKey(POLICY, version), 100, base=version - 1)
        # Of use to receivers that are behind; a newcomer does better with a full encoding.
        world.add(VersionKey(POLICY, version), 500, base=max(0, version - 8), merged=True)
        world.add(VersionKey(POLICY, version), 50)
    world.remove(world.removable(keep=20))
    merged = {
        version
        for version, items in world.of().items()
        for item in items
        if item.kind == weights_pb2.ENCODING_KIND_MERGED_DELTA
    }
    assert merged == set(range(22, 30))
    assert set(range(10, 30)) <= set(world.numbers())


def test_a_chain_that_grows_without_anchors_is_not_cut() -> None:
    world = World()
    world.add(VersionKey(POLICY, 0), 1000)
    for version in range(1, 200):
        world.add(VersionKey(POLICY, version), 100, base=version - 1)
        world.remove(world.removable(keep=2))
    assert reachable(world.of(), CODECS) == set(range(200))


def test_an_anchor_lets_go_of_what_lies_before_it_and_before_history() -> None:
    world = World()
    world.add(VersionKey(POLICY, 0), 1000)
    for version in range(1, 200):
        world.add(VersionKey(POLICY, version), 100, base=version - 1)
    world.add(VersionKey(POLICY, 198), 1000)
    world.remove(world.removable(keep=2))
    # Single deltas worth two full encodings stay, whose bases do not.
    assert world.numbers() == list(range(199, 179, -1))
    assert reachable(world.of(), CODECS) == {198, 199}


def _manifest(path: str) -> VersionKey | None:
    return layout.version_of(JOB, path) if path.endswith("/manifest") else None
