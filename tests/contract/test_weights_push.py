"""Versions that are pushed while they are published, over real gRPC: what comes before what, and what is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from longshore.errors import NotFound
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc import convert
from longshore.rpc.channel import channel
from longshore.weight_store import metrics
from longshore.weight_store.decoding import CODECS
from longshore.weight_store.store import WeightStore
from longshore.weight_store.version import sign_pointer
from longshore.weights.client import Copies, News, WeightsClient
from longshore.weights.fetching import Fetching
from longshore.weights.parcel import Base, Parcel, pack

WAIT_S = 20.0


class Wire:
    """A connection past the client: what it would never send can be sent, and what comes is seen as it comes."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.channel = channel(weights.address)
        self.stub = weights_pb2_grpc.WeightsServiceStub(self.channel)

    def watch(
        self, have: Sequence[int] = (), codecs: Sequence[str] = CODECS, *, push: bool = True, pointer: str = "head"
    ) -> Any:
        request = weights_pb2.WatchRequest(job=self._job, pointer=pointer, push=push, have=have, codecs=codecs)
        return self.stub.Watch(request, wait_for_ready=True)

    async def publish(self, parcel: Parcel, *parts: bytes | asyncio.Event) -> bool:
        """Sends a header and these parts, or the parcel's own; an event is waited for between them."""

        async def messages() -> AsyncIterator[weights_pb2.PublishRequest]:
            yield weights_pb2.PublishRequest(header=parcel.header)
            for part in parts or [b"".join(parcel.parts)]:
                if isinstance(part, asyncio.Event):
                    await part.wait()
                else:
                    yield weights_pb2.PublishRequest(chunk=part)

        return (await self.stub.Publish(messages(), timeout=WAIT_S, wait_for_ready=True)).existed

    async def point(self, name: str, version: int, serial: int) -> None:
        signed = sign_pointer(self.weights.key, self.weights.job, name, version, serial, 2e10)
        await self.stub.SetPointer(weights_pb2.SetPointerRequest(pointer=signed), timeout=WAIT_S)

    @property
    def _job(self) -> Any:
        return convert.job_to_proto(self.weights.job)


@pytest.fixture
async def wire(weights: Any) -> AsyncIterator[Wire]:
    wire = Wire(weights)
    yield wire
    await wire.channel.close()


def full(weights: Any, version: int, serial: int, seed: int | None = None, epoch: int = 1) -> Parcel:
    """A version in full; its assets are taken to be at the store already."""
    tensors = weights.tensors(version if seed is None else seed)
    parcel = pack(weights.job, weights.key, weights.draft(version, epoch), tensors, weights.assets, serial)
    parcel.header.ClearField("assets")
    return parcel


def with_delta(weights: Any, version: int, base: int, serial: int) -> Parcel:
    tensors, before = weights.tensors(version), Base(base, weights.tensors(base))
    parcel = pack(weights.job, weights.key, weights.draft(version), tensors, weights.assets, serial, before)
    parcel.header.ClearField("assets")
    return parcel


def halves(parcel: Parcel) -> tuple[bytes, bytes]:
    data = b"".join(parcel.parts)
    return data[: len(data) // 2], data[len(data) // 2 :]


class Told:
    """What one stream said, as words: push 1 from 0, bytes, broken, points to 1."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.words: list[str] = []
        self.data = b""

    async def until(self, word: str) -> list[str]:
        async with asyncio.timeout(WAIT_S):
            while word not in self.words:
                response = await self.call.read()
                assert response is not grpc.aio.EOF, self.words
                self._take(response)
        words, self.words = self.words, []
        return words

    def _take(self, response: weights_pb2.WatchResponse) -> None:
        if response.HasField("push"):
            self.data = b""
            self.words.append("push " + ", ".join(map(step_name, response.push.path)))
        if response.chunk:
            self.data += response.chunk
            if self.words[-1:] != ["bytes"]:
                self.words.append("bytes")
        if response.push_broken:
            self.words.append("broken")
        if response.HasField("pointer"):
            state = weights_pb2.Pointer.FromString(response.pointer.pointer)
            self.words.append(f"{state.name} is {state.version}")


def step_name(step: weights_pb2.PathStep) -> str:
    encoding = step.encoding
    return f"{step.version} from {encoding.base_version}" if encoding.HasField("base_version") else str(step.version)


async def test_bytes_come_before_they_have_all_been_sent_and_the_pointer_after(weights, wire: Wire) -> None:
    await weights.publish(weights.client(), 0)
    told = Told(wire.watch(have=[0]))
    assert await told.until("head is 0") == ["head is 0"]
    parcel, go = full(weights, 1, 2**50), asyncio.Event()
    first, second = halves(parcel)
    publishing = asyncio.create_task(wire.publish(parcel, first, go, second))
    assert await told.until("bytes") == ["push 1", "bytes"]
    assert told.data == first
    go.set()
    assert await told.until("head is 1") == ["bytes", "head is 1"]
    assert told.data == first + second
    assert await publishing is False


async def test_a_delta_is_pushed_to_who_has_its_base_alone(weights, wire: Wire) -> None:
    await weights.publish(weights.client(), 0)
    holder, stranger = Told(wire.watch(have=[0])), Told(wire.watch(have=[7], codecs=["of the future"]))
    await holder.until("head is 0")
    assert await stranger.until("head is 0") == ["push 0", "bytes", "head is 0"]
    go = asyncio.Event()
    parcel = with_delta(weights, 1, 0, 2**50)
    publishing = asyncio.create_task(wire.publish(parcel, halves(parcel)[0], go, halves(parcel)[1]))
    assert await holder.until("bytes") == ["push 1 from 0", "bytes"]
    go.set()
    assert await holder.until("head is 1") == ["bytes", "head is 1"]
    # It cannot decode deltas. A full encoding may have been made by now, or not.
    words = await stranger.until("head is 1")
    assert words in (["head is 1"], ["push 1", "bytes", "head is 1"])
    await publishing


async def test_who_did_not_ask_for_bytes_gets_none(weights, wire: Wire) -> None:
    await weights.publish(weights.client(), 0)
    told = Told(wire.watch(push=False))
    await told.until("head is 0")
    await wire.publish(full(weights, 1, 2**50))
    assert await told.until("head is 1") == ["head is 1"]


@pytest.mark.parametrize("name", ["serving", "pin/best", "channel/canary"])
async def test_other_pointers_bring_their_version_too(weights, wire: Wire, name: str) -> None:
    for version in (0, 1):
        await weights.publish(weights.client(), version)
    told = Told(wire.watch(pointer=name, codecs=["safetensors"]))
    await wire.point(name, 1, 1)
    assert await told.until(f"{name} is 1") == ["push 1", "bytes", f"{name} is 1"]
    await wire.point(name, 0, 2)
    assert await told.until(f"{name} is 0") == ["push 0", "bytes", f"{name} is 0"]
    # Held by now.
    await wire.point(name, 1, 3)
    assert await told.until(f"{name} is 1") == [f"{name} is 1"]


@pytest.mark.parametrize("fault", ["a wrong byte", "too few bytes", "hung up", "too many bytes"])
async def test_a_publish_that_fails_after_its_bytes_were_pushed_is_taken_back(weights, wire: Wire, fault: str) -> None:
    await weights.publish(weights.client(), 0)
    told = Told(wire.watch(have=[0]))
    await told.until("head is 0")
    parcel, go = full(weights, 1, 2**50), asyncio.Event()
    first, second = halves(parcel)
    sent = {
        "a wrong byte": second[:-1] + bytes([second[-1] ^ 1]),
        "too few bytes": second[:-1],
        "too many bytes": second + b"\0",
    }
    publishing = asyncio.create_task(wire.publish(parcel, first, go, sent.get(fault, b"")))
    await told.until("bytes")
    if fault == "hung up":
        publishing.cancel()
    go.set()
    assert "broken" in await told.until("broken")
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await publishing
    # The number goes to another learner's weights, and they are what is pushed and pointed to.
    other = full(weights, 1, 2**50 + 1, seed=9, epoch=2)
    await wire.publish(other)
    assert await told.until("head is 1") == ["push 1", "bytes", "head is 1"]
    assert told.data == b"".join(other.parts)


async def test_a_reader_never_takes_what_was_pushed_for_what_was_published(
    weights, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two learners on one number; the slower one's bytes had been pushed whole."""
    await weights.publish(weights.client(), 0)
    reader = held_client(weights)
    news = reader.watch()
    assert await following(news, 0) == [(0, False), (0, True)]
    await reader.fetch(0)
    commit, losers, go = WeightStore.commit, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(self: WeightStore, admission: Any, *arguments: Any) -> bool:
        if admission.manifest.lineage.learner_epoch == 1:
            loop.call_soon_threadsafe(losers.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(WAIT_S)
        return commit(self, admission, *arguments)

    monkeypatch.setattr(WeightStore, "commit", slow)
    losing = asyncio.create_task(wire.publish(full(weights, 1, 2**50)))
    await asyncio.wait_for(losers.wait(), WAIT_S)
    # It is here, and right by its manifest; but nothing says that it was published.
    assert await asyncio.wait_for(anext(news), WAIT_S) == News(1, published=False)
    assert (await reader.fetch(1)).tensors == tuple(weights.tensors(1))
    assert reader._copies.get(1) is None
    await wire.publish(full(weights, 1, 2**50 + 1, seed=9, epoch=2))
    go.set()
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await losing
    assert info.value.code() in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION)
    assert (await following(news, 1))[-1] == (1, True)
    assert (await reader.fetch(1)).tensors == tuple(weights.tensors(9))
    held = reader._copies.get(1)
    assert held is not None
    assert held.tensors == tuple(weights.tensors(9))
    await news.aclose()  # type: ignore[attr-defined]


async def test_what_was_withdrawn_is_not_to_be_had(weights, wire: Wire) -> None:
    await weights.publish(weights.client(), 0)
    reader = held_client(weights)
    news = reader.watch()
    await following(news, 0)
    parcel, go = full(weights, 1, 2**50), asyncio.Event()
    first, second = halves(parcel)
    publishing = asyncio.create_task(wire.publish(parcel, first, go, second[:-1] + bytes([second[-1] ^ 1])))
    go.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await publishing
    await eventually(lambda: not reader._watches["head"]._arrivals._pending.keys() - {0})
    with pytest.raises(NotFound):
        await reader.fetch(1, timeout=5)
    await wire.publish(full(weights, 1, 2**50 + 1, seed=9))
    await following(news, 1)
    assert (await reader.fetch(1)).tensors == tuple(weights.tensors(9))
    await news.aclose()  # type: ignore[attr-defined]


async def test_what_was_pushed_is_not_asked_for_again(weights, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = weights.client()
    await weights.publish(writer, 0)
    reader = held_client(weights)
    news = reader.watch()

    async def never(*_: object) -> None:
        raise AssertionError("asked for a version that was pushed")

    monkeypatch.setattr(Fetching, "version", never)
    for version in range(4):
        if version:
            await weights.publish(writer, version)
        await following(news, version)
        assert (await reader.fetch(version)).tensors == tuple(weights.tensors(version))
    await news.aclose()  # type: ignore[attr-defined]


async def test_versions_that_nobody_fetches_are_bases_all_the_same(weights) -> None:
    writer = weights.client()
    await weights.publish(writer, 0)
    reader = held_client(weights)
    news = reader.watch()
    before = faults(weights)
    for version in range(6):
        if version:
            await weights.publish(writer, version)
        await following(news, version)
    assert (await reader.fetch(5)).tensors == tuple(weights.tensors(5))
    assert faults(weights) == before
    await eventually(lambda: 5 in reader._copies.keys())  # noqa: SIM118 - no mapping
    await news.aclose()  # type: ignore[attr-defined]


async def test_a_reader_that_lost_its_base_is_served_from_what_it_still_has(weights) -> None:
    writer = weights.client()
    await weights.publish(writer, 0)
    reader = held_client(weights)
    news = reader.watch()
    await following(news, 0)
    await reader.fetch(0)
    # What holds it after its proof has run.
    await asyncio.sleep(0.01)
    before = faults(weights)
    reader._copies.discard(0)
    reader._watches["head"]._arrivals.close()
    await weights.publish(writer, 1)
    await following(news, 1)
    assert (await reader.fetch(1)).tensors == tuple(weights.tensors(1))
    assert faults(weights) == before + 1
    await news.aclose()  # type: ignore[attr-defined]


async def test_a_first_version_comes_with_assets_that_can_be_fetched_when_it_is_told_of(weights) -> None:
    reader = held_client(weights)
    news = reader.watch()
    first = asyncio.create_task(anext(news))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    await weights.publish(weights.client(), 0)
    item = await asyncio.wait_for(first, WAIT_S)
    policy = await reader.fetch(item.version)
    assert await reader.assets(policy.assets_sha256) == weights.assets
    assert policy.tensors == tuple(weights.tensors(0))
    await news.aclose()  # type: ignore[attr-defined]


async def test_many_watchers_get_every_byte_each(weights, wire: Wire) -> None:
    await weights.publish(weights.client(), 0)
    calls = [Told(wire.watch(have=[0], codecs=["safetensors"])) for _ in range(6)]
    for told in calls:
        await told.until("head is 0")
    parcel = full(weights, 1, 2**50)
    go = asyncio.Event()
    first, second = halves(parcel)
    publishing = asyncio.create_task(wire.publish(parcel, first, go, second))
    await calls[0].until("bytes")
    # One that goes away in the middle hurts nobody; one that comes in the middle gets the version with its pointer.
    calls.pop().call.cancel()
    calls.append(Told(wire.watch(have=[], codecs=["safetensors"])))
    go.set()
    await publishing
    for told in calls:
        await told.until("head is 1")
        assert told.data == b"".join(parcel.parts)


async def test_a_watcher_that_reads_slowly_gets_the_newest_whole(weights, wire: Wire) -> None:
    """More than fits into what lies between a server and a reader who does not read."""
    size = 400_000
    writer = weights.client()
    await weights.publish(writer, 0, size=size)
    told = Told(wire.watch(have=[], codecs=["safetensors"]))
    for version in range(1, 5):
        # From new clients, who publish in full.
        await weights.publish(weights.client(), version, size=size)
    words = await told.until("head is 4")
    pushes = [word for word in words if word.startswith("push")]
    assert len(pushes) < 5
    assert pushes[-1] == "push 4"
    tensors = weights.tensors(4, size)
    assert told.data.endswith(b"".join(tensor.data for tensor in tensors))


async def test_too_many_versions_are_refused(weights, wire: Wire) -> None:
    call = wire.watch(have=range(65))
    with pytest.raises(grpc.aio.AioRpcError) as info:
        await call.read()
    assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "65" in (info.value.details() or "")


def held_client(weights: Any) -> WeightsClient:
    client = WeightsClient(weights.address, weights.job, weights.key.public_key, Copies[int](3, 1 << 30))
    weights._clients.append(client)
    return client


def faults(weights: Any) -> float:
    return metrics.FAULTS.labels(weights.job.project, weights.job.job, "push")._value.get()


async def following(news: AsyncIterator[News], version: int) -> list[tuple[int, bool]]:
    """Reads news until the pointer names the version."""
    seen = []
    async with asyncio.timeout(WAIT_S):
        async for item in news:
            seen.append((item.version, item.published))
            if item == News(version, published=True):
                return seen
    raise AssertionError(f"the watch ended after {seen}")


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - another task's doing
            await asyncio.sleep(0.005)
