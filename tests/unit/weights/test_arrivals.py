"""Versions whose bytes came before they were asked for: put together, proven, held, forgotten."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from weight_parcels import delta_parcel, full_parcel, history

from longshore.errors import IntegrityError, LongshoreError, Rejected
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.copies import Copies
from longshore.weights.arrivals import MAX_PENDING, Arrivals, Arrived
from longshore.weights.parcel import Parcel

WAIT_S = 10.0
TENSORS = history(6, size=400)
FULL = [full_parcel(version, tensors) for version, tensors in enumerate(TENSORS)]
DELTA = [delta_parcel(v, TENSORS[v], v - 1, TENSORS[v - 1]) for v in range(1, 6)]


class Bench:
    def __init__(self) -> None:
        self.copies: Copies[int] = Copies(3, 1 << 20)
        self.faults: list[tuple[int, LongshoreError]] = []
        self.arrivals = Arrivals(self.copies, lambda version, error: self.faults.append((version, error)))

    def begin(self, parcel: Parcel, *, path: list[weights_pb2.PathStep] | None = None) -> None:
        manifest = weights_pb2.Manifest.FromString(parcel.header.manifest.manifest)
        step = weights_pb2.PathStep(version=manifest.version, encoding=parcel.header.encoding)
        push = weights_pb2.VersionPush(manifest=parcel.header.manifest, path=path or [step])
        self.arrivals.begin(manifest, push)

    def push(self, parcel: Parcel, data: bytes | None = None) -> int | None:
        self.begin(parcel)
        return self.arrivals.add(b"".join(parcel.parts) if data is None else data)

    async def get(self, version: int) -> Arrived | None:
        return await asyncio.wait_for(self.arrivals.get(version), WAIT_S)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.arrivals.close()


async def test_a_version_is_proven_when_its_last_byte_has_come(bench: Bench) -> None:
    data = b"".join(FULL[0].parts)
    bench.begin(FULL[0])
    assert bench.arrivals.add(data[:100]) is None
    assert await bench.get(0) is None
    assert bench.arrivals.add(data[100:]) == 0
    arrived = await bench.get(0)
    assert arrived is not None
    assert arrived[0].version == 0
    assert arrived[1].tensors == tuple(TENSORS[0])
    # Not before a pointer names it.
    assert bench.copies.keys() == []
    bench.arrivals.confirm(0)
    await asyncio.sleep(0)
    assert bench.copies.keys() == [0]


async def test_a_version_that_is_pointed_to_while_it_is_decoded_is_held_when_it_is_proven(bench: Bench) -> None:
    bench.push(FULL[0])
    bench.arrivals.confirm(0)
    assert bench.copies.keys() == []
    await bench.get(0)
    await asyncio.sleep(0)
    assert bench.copies.keys() == [0]
    bench.arrivals.confirm(5)


async def test_deltas_build_on_what_has_come_and_what_is_held(bench: Bench) -> None:
    bench.push(FULL[0])
    for parcel in DELTA[:2]:
        bench.push(parcel)
    arrived = await bench.get(2)
    assert arrived is not None
    assert arrived[1].tensors == tuple(TENSORS[2])
    # Another stream begins from the copies alone.
    bench.copies.put(2, arrived[1])
    other = Bench()
    other.arrivals = Arrivals(bench.copies, lambda *_: None)
    other.push(DELTA[2])
    third = await other.get(3)
    assert third is not None
    assert third[1].tensors == tuple(TENSORS[3])


async def test_a_path_of_several_encodings_comes_in_any_pieces(bench: Bench) -> None:
    steps = [
        weights_pb2.PathStep(version=version, encoding=parcel.header.encoding)
        for version, parcel in enumerate((FULL[0], *DELTA[:2]))
    ]
    data = b"".join(b"".join(parcel.parts) for parcel in (FULL[0], *DELTA[:2]))
    bench.begin(FULL[2], path=steps)
    ends = [bench.arrivals.add(data[start : start + 37]) for start in range(0, len(data), 37)]
    assert ends == [None] * (len(ends) - 1) + [2]
    arrived = await bench.get(2)
    assert arrived is not None
    assert arrived[1].tensors == tuple(TENSORS[2])


async def test_more_bytes_than_were_announced_and_bytes_of_nothing_are_refused(bench: Bench) -> None:
    with pytest.raises(Rejected, match="belong to no version"):
        bench.arrivals.add(b"x")
    data = b"".join(FULL[0].parts)
    bench.begin(FULL[0])
    with pytest.raises(Rejected, match="more bytes"):
        bench.arrivals.add(data + b"x")


async def test_a_base_that_is_not_held_is_refused_before_any_byte(bench: Bench) -> None:
    with pytest.raises(Rejected, match="against 0, which is not held"):
        bench.begin(DELTA[0])


async def test_wrong_bytes_are_a_fault_and_no_base(bench: Bench) -> None:
    data = bytearray(b"".join(FULL[0].parts))
    data[-1] ^= 1
    assert bench.push(FULL[0], bytes(data)) == 0
    with pytest.raises(IntegrityError):
        await bench.get(0)
    assert [version for version, _ in bench.faults] == [0]
    bench.arrivals.confirm(0)
    assert bench.copies.keys() == []
    with pytest.raises(Rejected):
        bench.begin(DELTA[0])
    # The number is not spent.
    bench.push(FULL[0])
    assert await bench.get(0) is not None


async def test_what_was_sent_last_is_taken_back_and_nothing_else(bench: Bench) -> None:
    bench.push(FULL[0])
    bench.push(DELTA[0])
    bench.arrivals.broken()
    assert await bench.get(0) is not None
    assert await bench.get(1) is None
    # Half of a version is taken back without harm to a whole one.
    bench.begin(DELTA[0])
    bench.arrivals.broken()
    assert await bench.get(0) is not None
    with pytest.raises(Rejected):
        bench.arrivals.add(b"x")
    assert bench.faults == []


async def test_other_weights_under_the_same_number_take_its_place(bench: Bench) -> None:
    bench.push(full_parcel(1, TENSORS[4]))
    bench.push(FULL[1])
    arrived = await bench.get(1)
    assert arrived is not None
    assert arrived[1].tensors == tuple(TENSORS[1])


async def test_a_version_that_is_cut_short_is_told_and_given_up(bench: Bench) -> None:
    assert bench.arrivals.cut_short() is None
    bench.begin(FULL[0])
    bench.arrivals.add(b"x")
    assert bench.arrivals.cut_short() == 0
    with pytest.raises(Rejected):
        bench.arrivals.add(b"x")


async def test_few_versions_wait_at_a_time(bench: Bench) -> None:
    for parcel in FULL:
        bench.push(parcel)
    oldest = len(FULL) - MAX_PENDING
    for version in range(len(FULL)):
        assert (await bench.get(version) is not None) == (version >= oldest)


async def test_a_base_that_was_given_up_leaves_no_version_that_never_comes(bench: Bench) -> None:
    """Whoever asks for such a version must be told that it is not here, and nothing may be decoded against it."""
    bench.push(FULL[0])
    bench.push(DELTA[0])
    await asyncio.sleep(0)
    bench.arrivals._forget(0)
    with contextlib.suppress(asyncio.CancelledError, IntegrityError):
        await bench.get(1)
    await asyncio.sleep(0)
    assert await bench.get(1) is None
    with pytest.raises(Rejected):
        bench.begin(DELTA[1])


async def test_closing_ends_what_is_being_decoded(bench: Bench) -> None:
    bench.push(FULL[0])
    bench.arrivals.close()
    assert await bench.get(0) is None
