"""Following head over real gRPC: through restarts, many watchers, and pointers that must not be believed."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest

from longshore.errors import IntegrityError, NotFound
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.rpc.server import RpcServer
from longshore.signing import SigningKey
from longshore.weight_store.store import WeightStore
from longshore.weight_store.version import sign_pointer
from longshore.weights.parcel import pack

DEADLINE_S = 20.0


async def until(stream, version: int) -> list[int]:
    """Reads heads until one is `version`."""
    seen = []
    async with asyncio.timeout(DEADLINE_S):
        async for head in stream:
            seen.append(head)
            if head == version:
                return seen
    raise AssertionError(f"the watch ended after {seen}")


async def test_a_watch_begins_with_the_present_head_and_follows_it(weights) -> None:
    writer = weights.client()
    await weights.publish(writer, 0)
    stream = weights.client().watch_head()
    assert await until(stream, 0) == [0]
    await weights.publish(writer, 1)
    assert await until(stream, 1) == [1]
    await stream.aclose()


async def test_a_watch_may_begin_before_there_is_a_head(weights) -> None:
    stream = weights.client().watch_head()
    waiting = asyncio.create_task(until(stream, 0))
    await asyncio.sleep(0.2)
    await weights.publish(weights.client(), 0)
    assert await waiting == [0]
    await stream.aclose()


async def test_every_watcher_sees_the_last_of_many_heads_in_order(weights) -> None:
    watchers = [weights.client().watch_head() for _ in range(8)]
    readers = [asyncio.create_task(until(stream, 11)) for stream in watchers]
    writer = weights.client()
    for version in range(12):
        await weights.publish(writer, version, size=10)
    for seen in await asyncio.gather(*readers):
        assert seen == sorted(set(seen))
    for stream in watchers:
        await stream.aclose()


async def test_a_slow_reader_gets_the_newest_head_not_the_backlog(weights) -> None:
    writer, reader = weights.client(), weights.client()
    stream = reader.watch_head()
    await weights.publish(writer, 0, size=10)
    assert await anext(stream) == 0
    for version in range(1, 6):
        await weights.publish(writer, version, size=10)
    other = reader.watch_head()
    await until(other, 5)
    assert await anext(stream) == 5
    await stream.aclose()
    await other.aclose()


async def test_a_watch_survives_a_restart_of_the_store(weights) -> None:
    writer, stream = weights.client(), weights.client().watch_head()
    await weights.publish(writer, 0)
    assert await until(stream, 0) == [0]
    await weights.stop()
    await weights.start()
    # Head is told again after the restart, but has not moved: only version 1 may be seen.
    await weights.publish(writer, 1)
    assert await until(stream, 1) == [1]
    await stream.aclose()


async def test_a_head_is_told_even_when_its_publisher_hung_up(weights, monkeypatch) -> None:
    entered, go = threading.Event(), threading.Event()
    commit = WeightStore.commit

    def slow(self: WeightStore, *arguments: Any) -> bool:
        entered.set()
        assert go.wait(DEADLINE_S)
        return commit(self, *arguments)

    monkeypatch.setattr(WeightStore, "commit", slow)
    stream = weights.client().watch_head()
    reading = asyncio.create_task(until(stream, 0))
    publisher = weights.client()
    publishing = asyncio.create_task(weights.publish(publisher, 0))
    assert await asyncio.to_thread(entered.wait, DEADLINE_S)
    publishing.cancel()
    await asyncio.wait([publishing])
    await publisher.close()
    # The store must have noticed before it goes on; a call to it from here is behind the cancellation.
    await weights.client().versions()
    go.set()
    assert await reading == [0]
    assert (await weights.client().fetch(0)).tensors == tuple(weights.tensors(0))
    await stream.aclose()


async def test_draining_does_not_wait_for_watchers(weights) -> None:
    stream = weights.client().watch_head()
    await weights.publish(weights.client(), 0)
    assert await anext(stream) == 0
    started = time.monotonic()
    await weights.stop()
    # The grace that drain gives to calls that do not end is two seconds.
    assert time.monotonic() - started < 1.5
    await stream.aclose()


async def test_a_watch_ends_when_its_client_is_closed(weights) -> None:
    await weights.publish(weights.client(), 0)
    client = weights.client()
    stream = client.watch_head()
    assert await anext(stream) == 0
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0.05)
    await client.close()
    assert await asyncio.wait_for(waiting, 5) is None


class Liar(weights_pb2_grpc.WeightsServiceServicer):
    """A store that says what it is told to."""

    def __init__(self) -> None:
        self.pointers: list[weights_pb2.SignedPointer] = []
        self.manifest = weights_pb2.SignedManifest()
        self.keys = weights_pb2.GetKeysResponse()

    async def GetKeys(self, request, context):
        return self.keys

    async def GetVersion(self, request, context):
        return weights_pb2.GetVersionResponse(manifest=self.manifest)

    async def Watch(self, request, context):
        for pointer in self.pointers:
            yield weights_pb2.WatchResponse(pointer=pointer)
            await asyncio.sleep(0.02)
        await asyncio.sleep(60)


@pytest.fixture
async def liar(stopped_weights):
    server = RpcServer(stopped_weights.address)
    servicer = Liar()
    servicer.keys.public_key = stopped_weights.key.public_key
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(servicer, server.server)
    await server.start()
    yield servicer
    await server.drain(0)


async def test_heads_that_must_not_be_believed_are_passed_over(liar, stopped_weights) -> None:
    bench, later = stopped_weights, time.time() + 100

    def head(version: int, serial: int, expires_at: float = later, key: SigningKey = bench.key, name: str = "head"):
        return sign_pointer(key, bench.job, name, version, serial, expires_at)

    liar.pointers = [
        head(1, 10),
        head(2, 9),
        head(3, 11, key=SigningKey.generate()),
        head(4, 12, name="serving"),
        head(5, 13, expires_at=time.time() - 1),
        head(6, 14),
    ]
    client = bench.client()
    stream = client.watch_head()
    assert await until(stream, 6) == [1, 6]
    await stream.aclose()
    # Nor may a new watch be set back to what the client knows to be old.
    liar.pointers = [head(2, 9), head(7, 20)]
    stream = client.watch_head()
    assert await until(stream, 7) == [6, 7]
    await stream.aclose()


async def test_head_refuses_a_forged_or_expired_pointer(liar, stopped_weights) -> None:
    bench = stopped_weights
    liar.pointers = [sign_pointer(SigningKey.generate(), bench.job, "head", 1, 1, time.time() + 100)]
    with pytest.raises(IntegrityError):
        await bench.client().head(timeout=5)
    liar.pointers = [sign_pointer(bench.key, bench.job, "head", 1, 1, time.time() - 1)]
    with pytest.raises(NotFound):
        await bench.client().head(timeout=5)


async def test_a_manifest_that_the_learner_did_not_sign_is_refused(liar, stopped_weights) -> None:
    bench = stopped_weights
    client = bench.client()

    def manifest(key: SigningKey, version: int) -> weights_pb2.SignedManifest:
        return pack(bench.job, key, bench.draft(version), bench.tensors(version), {}, 1).header.manifest

    liar.manifest = manifest(bench.key, 3)
    assert (await client.describe(3)).version == 3
    with pytest.raises(IntegrityError, match="version 3"):
        await client.describe(4)
    liar.manifest = manifest(SigningKey.generate(), 3)
    with pytest.raises(IntegrityError, match="not known to be one of"):
        await client.describe(3)
    # Nor does it help to call that key by a known one's name.
    liar.manifest.key_id = bench.key.key_id
    with pytest.raises(IntegrityError, match="signature"):
        await client.describe(3)


async def test_a_pointers_serial_must_grow_and_its_version_exist(weights) -> None:
    client = weights.client()
    await weights.publish(client, 0)
    stub = weights_pb2_grpc.WeightsServiceStub(client._channel)

    async def code(version: int, serial: int, expires_at: float = 2e10) -> grpc.StatusCode:
        signed = sign_pointer(weights.key, weights.job, "serving", version, serial, expires_at)
        try:
            await stub.SetPointer(weights_pb2.SetPointerRequest(pointer=signed), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    assert await code(0, 5) is grpc.StatusCode.OK
    assert await code(0, 5) is grpc.StatusCode.OK
    assert await code(0, 4) is grpc.StatusCode.FAILED_PRECONDITION
    assert await code(0, 5, expires_at=3e10) is grpc.StatusCode.FAILED_PRECONDITION
    assert await code(1, 6) is grpc.StatusCode.NOT_FOUND
    assert await code(0, 6, expires_at=1.0) is grpc.StatusCode.INVALID_ARGUMENT
