"""A site's mirror behind a real store: versions flow through, follow their pointers, and never differ from home's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from link import Link
from mirrored_site import MirroredSite

from longshore.errors import Conflict, NotFound
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.relay import mirror as mirror_module
from longshore.rpc import convert
from longshore.rpc.channel import channel
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store.keychain import sign_rotation
from longshore.weight_store.version import sign_pointer
from longshore.weights.client import News, PolicyVersion, WeightsClient
from longshore.weights.parcel import Parcel, pack

WAIT_S = 20.0


class World:
    """A home store, a link that can be cut, a site, and a connection to home past the client."""

    def __init__(self, weights: Any, folder: Path) -> None:
        self.home = weights
        self.folder = folder
        self.link = Link(weights.address)
        self.channel = channel(weights.address)
        self.stub = weights_pb2_grpc.WeightsServiceStub(self.channel)
        self.site: MirroredSite

    async def start(self) -> World:
        await self.link.start()
        self.site = MirroredSite(self.folder / "site", self.home.job, self.home.key.public_key, self.link.address)
        await self.site.start()
        return self

    async def close(self) -> None:
        await self.site.close()
        await self.channel.close()
        await self.link.stop()

    async def send(self, parcel: Parcel, *parts: bytes | asyncio.Event) -> None:
        async def messages() -> AsyncIterator[weights_pb2.PublishRequest]:
            yield weights_pb2.PublishRequest(header=parcel.header)
            for part in parts or [b"".join(parcel.parts)]:
                if isinstance(part, asyncio.Event):
                    await part.wait()
                else:
                    yield weights_pb2.PublishRequest(chunk=part)

        await self.stub.Publish(messages(), timeout=WAIT_S, wait_for_ready=True)

    def parcel(self, version: int, serial: int, seed: int, epoch: int = 1) -> Parcel:
        """A version in full, whose assets home has."""
        tensors, draft = self.home.tensors(seed), self.home.draft(version, epoch)
        parcel = pack(self.home.job, self.home.key, draft, tensors, self.home.assets, serial)
        parcel.header.ClearField("assets")
        return parcel

    async def point(self, name: str, version: int, serial: int) -> None:
        signed = sign_pointer(self.home.key, self.home.job, name, version, serial, 2e10)
        await self.stub.SetPointer(weights_pb2.SetPointerRequest(pointer=signed), timeout=WAIT_S)

    async def same_as_home(self) -> list[int]:
        """Versions of the site, newest first, after checking that each is what home published."""
        for version in self.site.versions():
            request = weights_pb2.GetVersionRequest(
                job=convert.job_to_proto(self.home.job), version=version, weight_set=weights_pb2.WEIGHT_SET_POLICY
            )
            told = await self.stub.GetVersion(request, timeout=WAIT_S)
            assert self.site.manifest(version) == told.manifest.manifest
        return self.site.versions()


@pytest.fixture
async def world(weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(mirror_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(mirror_module, "COMMIT_S", 0.5)
    world = await World(weights, tmp_path).start()
    yield world
    await world.close()


async def following(news: AsyncIterator[News], version: int) -> list[tuple[int, bool]]:
    seen = []
    async with asyncio.timeout(WAIT_S):
        async for item in news:
            seen.append((item.version, item.published))
            if item == News(version, published=True):
                return seen
    raise AssertionError(f"the watch ended after {seen}")


async def fetched(client: WeightsClient, version: int) -> PolicyVersion:
    return await asyncio.wait_for(client.fetch(version), WAIT_S)


async def test_bytes_reach_the_sites_readers_before_home_has_them_all(world: World) -> None:
    await world.home.publish(world.home.client(), 0)
    await world.site.until_head(0)
    job = convert.job_to_proto(world.home.job)
    async with channel(world.site.address) as opened:
        request = weights_pb2.WatchRequest(job=job, push=True, have=[0], codecs=["safetensors"])
        call = weights_pb2_grpc.WeightsServiceStub(opened).Watch(request)
        assert (await call.read()).HasField("pointer")
        parcel, go = world.parcel(1, 2**50, seed=1), asyncio.Event()
        data = b"".join(parcel.parts)
        publishing = asyncio.create_task(world.send(parcel, data[:3000], go, data[3000:]))
        assert (await asyncio.wait_for(call.read(), WAIT_S)).push.manifest == parcel.header.manifest
        assert (await asyncio.wait_for(call.read(), WAIT_S)).chunk == data[:3000]
        go.set()
        await publishing
        rest = [await asyncio.wait_for(call.read(), WAIT_S) for _ in range(2)]
        assert rest[0].chunk == data[3000:]
        assert weights_pb2.Pointer.FromString(rest[1].pointer.pointer).version == 1
        call.cancel()
    assert world.site.faults == 0


async def test_what_home_takes_back_the_site_takes_back(world: World) -> None:
    await world.home.publish(world.home.client(), 0)
    reader = world.site.reader()
    news = reader.watch()
    await following(news, 0)
    bad, go = world.parcel(1, 2**50, seed=1), asyncio.Event()
    data = b"".join(bad.parts)
    sending = asyncio.create_task(world.send(bad, data[:3000], go, data[3000:-1] + bytes([data[-1] ^ 1])))
    go.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await sending
    await world.site.until(lambda: world.site.faults > 0)
    assert world.site.versions() == [0]
    with pytest.raises(NotFound):
        await reader.fetch(1, timeout=5)
    await world.send(world.parcel(1, 2**50 + 1, seed=9, epoch=2))
    seen = await following(news, 1)
    assert (await fetched(reader, 1)).tensors == tuple(world.home.tensors(9))
    assert seen.count((1, True)) == 1
    assert await world.same_as_home() == [1, 0]
    await news.aclose()  # type: ignore[attr-defined]


async def test_two_learners_race_for_each_number(world: World) -> None:
    first, second = world.home.client(), world.home.client()
    await world.home.publish(first, 0)
    reader = world.site.reader()
    news = reader.watch()
    await following(news, 0)

    async def race(client: WeightsClient, version: int, seed: int) -> int | None:
        try:
            await client.publish(world.home.key, world.home.draft(version), world.home.tensors(seed), world.home.assets)
        except Conflict:
            return None
        return seed

    winners = set()
    for version in range(1, 7):
        ends = await asyncio.gather(race(first, version, version), race(second, version, 100 + version))
        (winner,) = [seed for seed in ends if seed is not None]
        winners.add(winner >= 100)
        await following(news, version)
        assert (await fetched(reader, version)).tensors == tuple(world.home.tensors(winner))
    # Home keeps three; all that the site has of them is home's.
    newest = world.site.versions()[:3]
    for version in newest:
        assert (await fetched(world.site.reader(copies=False), version)).version == version
    world.site.store.collect(world.home.job)
    assert newest == [6, 5, 4]
    await news.aclose()  # type: ignore[attr-defined]


async def test_pointers_move_back_and_forth_at_the_site_as_at_home(world: World) -> None:
    writer = world.home.client()
    for version in range(3):
        await world.home.publish(writer, version)
    await world.point("serving", 2, 1)
    reader = world.site.reader()
    news = reader.watch("serving")
    await following(news, 2)
    await world.point("serving", 0, 2)
    await following(news, 0)
    assert (await fetched(reader, 0)).tensors == tuple(world.home.tensors(0))
    await world.point("head", 1, 2**50)
    await world.site.until_head(1)
    await news.aclose()  # type: ignore[attr-defined]


async def test_a_version_that_is_evaluated_is_pinned_at_the_site_too(world: World) -> None:
    writer = world.home.client()
    await world.home.publish(writer, 0)
    await world.site.until_head(0)
    await world.point("pin/evaluated", 0, 1)
    reader = world.site.reader()
    news = reader.watch("pin/evaluated")
    await following(news, 0)
    await world.home.publish(writer, 1)
    await world.site.until_head(1)
    # What a pointer names, retention leaves: tests/unit/weight_store.
    assert {state.name: state.version for state in await reader.pointers()} == {"head": 1, "pin/evaluated": 0}
    await news.aclose()  # type: ignore[attr-defined]


async def test_an_old_version_that_somebody_asks_for_is_pushed_to_nobody(world: World) -> None:
    writer = world.home.client()
    await world.link.stop()
    await world.home.publish(writer, 0)
    await world.home.publish(writer, 1)
    await world.link.start()
    await world.site.until_head(1)
    assert world.site.versions() == [1]
    reader = world.site.reader()
    news = reader.watch()
    await following(news, 1)
    assert (await fetched(world.site.reader(), 0)).tensors == tuple(world.home.tensors(0))
    await world.home.publish(writer, 2)
    assert {version for version, _ in await following(news, 2)} == {2}
    assert world.site.faults == 0
    await news.aclose()  # type: ignore[attr-defined]


async def test_an_old_version_that_somebody_asks_for_stays_until_it_is_read(world: World) -> None:
    """It is none of the newest that the site keeps, and no pointer of the site names it yet."""
    world.site._site._keep = 1
    writer = world.home.client()
    await world.link.stop()
    await world.home.publish(writer, 0)
    await world.point("pin/first", 0, 1)
    await world.home.publish(writer, 1)
    await world.link.start()
    for version in (2, 3, 4):
        await world.home.publish(writer, version)
        await world.site.until_head(version)
    assert 0 not in world.site.versions()
    assert (await fetched(world.site.reader(), 0)).tensors == tuple(world.home.tensors(0))
    for version in (5, 6):
        await world.home.publish(writer, version)
        await world.site.until_head(version)
    assert 0 in world.site.versions()
    news = world.site.reader().watch("pin/first")
    await following(news, 0)
    await news.aclose()  # type: ignore[attr-defined]


async def test_a_pointer_to_an_old_version_is_followed_at_the_site(world: World) -> None:
    world.site._site._keep = 1
    writer = world.home.client()
    await world.link.stop()
    await world.home.publish(writer, 0)
    await world.point("pin/first", 0, 1)
    await world.home.publish(writer, 1)
    await world.link.start()
    for version in (2, 3):
        await world.home.publish(writer, version)
        await world.site.until_head(version)
    assert 0 not in world.site.versions()
    news = world.site.reader().watch("pin/first")
    await following(news, 0)
    assert 0 in world.site.versions()
    await news.aclose()  # type: ignore[attr-defined]


async def test_a_site_takes_nothing_from_its_callers_and_serves_one_job(world: World) -> None:
    await world.home.publish(world.home.client(), 0)
    await world.site.until_head(0)
    job, rival = convert.job_to_proto(world.home.job), SigningKey.generate()
    signed = sign_pointer(world.home.key, world.home.job, "serving", 0, 1, 2e10)
    rotation = sign_rotation(world.home.key, world.home.job, rival.public_key, 1, 1.0)
    other = convert.job_to_proto(JobRef(world.home.job.project, "another"))
    async with channel(world.site.address) as opened:
        stub = weights_pb2_grpc.WeightsServiceStub(opened)

        async def publish() -> None:
            await stub.Publish(world.parcel(1, 2**50, seed=1).messages(), timeout=WAIT_S)

        for writing in (
            stub.RegisterKey(weights_pb2.RegisterKeyRequest(job=other, public_key=rival.public_key, keep=1)),
            stub.RegisterKey(weights_pb2.RegisterKeyRequest(job=job, public_key=world.home.key.public_key, keep=1)),
            stub.RotateKey(weights_pb2.RotateKeyRequest(rotation=rotation)),
            stub.SetPointer(weights_pb2.SetPointerRequest(pointer=signed)),
            publish(),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="from home alone"):
                await writing
        with pytest.raises(grpc.aio.AioRpcError, match="not of default/another"):
            await stub.GetVersion(weights_pb2.GetVersionRequest(job=other, version=0, weight_set=1), timeout=WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError, match="not of default/another"):
            await stub.Watch(weights_pb2.WatchRequest(job=other, pointer="channel/other"), timeout=WAIT_S).read()
    assert world.site.versions() == [0]
    assert "channel/other" not in world.site.mirror._followed


async def test_a_rotation_of_keys_at_home_is_followed_at_once(world: World) -> None:
    await world.home.publish(world.home.client(), 0)
    await world.site.until_head(0)
    successor = SigningKey.generate()
    rotation = sign_rotation(world.home.key, world.home.job, successor.public_key, 1, 1.0)
    await world.stub.RotateKey(weights_pb2.RotateKeyRequest(rotation=rotation), timeout=WAIT_S)
    await world.home.client().publish(successor, world.home.draft(1), world.home.tensors(1), world.home.assets)
    await world.site.until_head(1)
    # The reader was given the first key alone.
    assert (await fetched(world.site.reader(), 1)).tensors == tuple(world.home.tensors(1))
    assert world.site.faults == 0


async def test_keys_that_home_puts_before_the_trusted_one_sign_nothing_here(weights: Any, tmp_path: Path) -> None:
    """Whoever holds home could make a chain that ends in the job's key, and sign with its beginning."""
    forger = SigningKey.generate()
    keys = weights_pb2.GetKeysResponse(
        public_key=forger.public_key,
        rotations=[sign_rotation(forger, weights.job, weights.key.public_key, 1, 1.0)],
    )
    site = MirroredSite(tmp_path / "site", weights.job, weights.key.public_key, weights.address)
    try:
        await site._site.adopt_keys(keys)
        forged = pack(weights.job, forger, weights.draft(1), weights.tensors(1), weights.assets, 1)
        step = weights_pb2.PathStep(version=1, encoding=forged.header.encoding)
        assert not site._site.knows(forger.key_id)
        with pytest.raises(Exception, match="not known to be one of"):
            site._site.version_of(forged.header.manifest, [step])
        with pytest.raises(Exception, match="not known to be one of"):
            site._site.pointed(forged.header.head)
        real = pack(weights.job, weights.key, weights.draft(1), weights.tensors(1), weights.assets, 1)
        assert site._site.version_of(real.header.manifest, [step]) == 1
    finally:
        await site.close()


async def test_whatever_the_link_does_the_site_ends_up_with_homes_versions(world: World) -> None:
    """Cut at random moments, and away now and then, while versions are published one after another."""
    source = random.Random(4)
    writer = world.home.client()
    await world.home.publish(writer, 0, size=50_000)

    def cut(count: int) -> None:
        if source.random() < 0.15:
            world.link.cut()

    world.link.on_bytes = cut
    for version in range(1, 9):
        # Now in full, now as a delta.
        client = writer if version % 3 else world.home.client()
        await world.home.publish(client, version, size=50_000)
        if version == 4:
            await world.link.stop()
        if version == 6:
            await world.link.start()
        if version < 4:
            await world.same_as_home()
    world.link.on_bytes = lambda count: None
    await world.site.until_head(8)
    assert (await fetched(world.site.reader(), 8)).tensors == tuple(world.home.tensors(8, 50_000))
