"""What one watcher is sent, over a real store and hub, without a wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import pytest
from weight_parcels import JOB, Bench, delta_parcel, full_parcel, history

from longshore.errors import NotFound
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.decoding import CODECS
from longshore.weight_store.hub import PointerHub
from longshore.weight_store.incoming import Incoming
from longshore.weight_store.pushing import MAX_HELD, Pushes, Wanted
from longshore.weights.parcel import Parcel

WAIT_S = 10.0
TENSORS = history(6, size=600)
Responses = AsyncGenerator[weights_pb2.WatchResponse, None]


class Origin:
    """A store with version 0, its hub, and publishes that a test takes through their parts by hand."""

    def __init__(self) -> None:
        self.bench = Bench(keep=20)
        self.hub = PointerHub()
        self.streams: list[Responses] = []
        self.bench.publish(full_parcel(0, TENSORS[0]))

    def watch(self, have: Sequence[int] | None, codecs: Sequence[str] = CODECS) -> Responses:
        wanted = None if have is None else Wanted(tuple(have), tuple(codecs))
        self.streams.append(Pushes(self.bench.store, self.hub, JOB, "head", wanted).responses())
        return self.streams[-1]

    def begin(self, parcel: Parcel) -> Incoming:
        manifest = weights_pb2.Manifest.FromString(parcel.header.manifest.manifest)
        incoming = Incoming(manifest.version, parcel.header.manifest, parcel.header.encoding, None)
        self.hub.announce(JOB, "head", incoming)
        return incoming

    def end(self, incoming: Incoming, parcel: Parcel, *, published: bool = True) -> None:
        if published:
            self.bench.publish(parcel)
        incoming.settle(published)
        self.hub.retire(JOB, "head", incoming)
        incoming.close()
        if published:
            state = self.bench.store.pointer(JOB, "head")
            assert state is not None
            self.hub.move(*state)


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    origin = Origin()
    yield origin
    for stream in origin.streams:
        await stream.aclose()


async def take(stream: Responses, count: int) -> list[str]:
    words = []
    async with asyncio.timeout(WAIT_S):
        for _ in range(count):
            words.append(word(await anext(stream)))
    return words


def word(response: weights_pb2.WatchResponse) -> str:
    if response.HasField("push"):
        return f"push {response.push.path[-1].version}"
    if response.chunk:
        return "bytes"
    if response.push_broken:
        return "broken"
    return f"head {weights_pb2.Pointer.FromString(response.pointer.pointer).version}"


async def test_a_slow_watcher_meets_a_publish_that_has_ended(origin: Origin) -> None:
    """It was sent the manifest, and the publish was over before it asked for the first byte."""
    stream = origin.watch([0])
    assert await take(stream, 1) == ["head 0"]
    parcel = full_parcel(1, TENSORS[1])
    incoming = origin.begin(parcel)
    await incoming.write(b"".join(parcel.parts))
    assert await take(stream, 1) == ["push 1"]
    origin.end(incoming, parcel)
    assert await take(stream, 2) == ["bytes", "head 1"]


async def test_what_was_pushed_and_not_published_is_taken_back_before_anything_else(origin: Origin) -> None:
    stream = origin.watch([0])
    await take(stream, 1)
    parcel, other = full_parcel(1, TENSORS[1]), full_parcel(1, TENSORS[2], epoch=2)
    losing = origin.begin(parcel)
    await losing.write(b"".join(parcel.parts))
    assert await take(stream, 2) == ["push 1", "bytes"]
    origin.end(origin.begin(other), other)
    origin.end(losing, parcel, published=False)
    assert await take(stream, 4) == ["broken", "push 1", "bytes", "head 1"]


async def test_a_publish_that_ends_does_not_hide_another_one(origin: Origin) -> None:
    stream = origin.watch([0])
    await take(stream, 1)
    first, second = full_parcel(1, TENSORS[1]), full_parcel(2, TENSORS[2])
    failing, going = origin.begin(first), origin.begin(second)
    origin.end(failing, first, published=False)
    await going.write(b"".join(second.parts))
    assert await take(stream, 2) == ["push 2", "bytes"]
    origin.end(going, second)
    assert await take(stream, 1) == ["head 2"]


async def test_a_chain_of_deltas_is_pushed_to_who_holds_its_start(origin: Origin) -> None:
    stream = origin.watch([0])
    await take(stream, 1)
    for version in range(1, 4):
        parcel = delta_parcel(version, TENSORS[version], version - 1, TENSORS[version - 1])
        incoming = origin.begin(parcel)
        await incoming.write(b"".join(parcel.parts))
        if version % 2:
            # Over before it was looked at: it comes from the store, as the same delta.
            origin.end(incoming, parcel)
            assert await take(stream, 3) == [f"push {version}", "bytes", f"head {version}"]
        else:
            assert await take(stream, 2) == [f"push {version}", "bytes"]
            origin.end(incoming, parcel)
            assert await take(stream, 1) == [f"head {version}"]


async def test_who_cannot_use_a_publish_waits_for_its_pointer(origin: Origin) -> None:
    alone, foreign, plain = origin.watch([9]), origin.watch([0], codecs=[]), origin.watch(None)
    assert await take(alone, 3) == ["push 0", "bytes", "head 0"]
    for stream in (foreign, plain):
        assert await take(stream, 1) == ["head 0"]
    # From a base that `alone` lacks, in a codec that `foreign` lacks, and `plain` wants no bytes.
    origin.bench.publish(full_parcel(1, TENSORS[1]))
    parcel = delta_parcel(2, TENSORS[2], 1, TENSORS[1])
    incoming = origin.begin(parcel)
    reads = [asyncio.create_task(anext(stream)) for stream in (alone, foreign, plain)]  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    assert not any(read.done() for read in reads)
    await incoming.write(b"".join(parcel.parts))
    origin.end(incoming, parcel)
    words = [word(await asyncio.wait_for(read, WAIT_S)) for read in reads]
    # A path for `alone`; none that `foreign` could decode.
    assert words == ["push 2", "head 2", "head 2"]


async def test_of_many_versions_the_newest_count_as_held(origin: Origin) -> None:
    pushes = Pushes(origin.bench.store, origin.hub, JOB, "head", Wanted(tuple(range(MAX_HELD + 10, 0, -1)), CODECS))
    assert pushes._held[-1] == MAX_HELD + 10
    assert len(pushes._held) == MAX_HELD
    pushes._hold(1000)
    assert (len(pushes._held), pushes._held[-1], MAX_HELD + 10 in pushes._held) == (MAX_HELD, 1000, True)


async def test_bytes_that_retention_took_are_a_broken_push(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: str, start: int, length: int) -> bytes:
        raise NotFound(path)

    monkeypatch.setattr(origin.bench.store, "read", gone)
    stream = origin.watch([])
    assert await take(stream, 3) == ["push 0", "broken", "head 0"]
