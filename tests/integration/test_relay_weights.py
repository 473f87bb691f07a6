"""The weights of a rollout site: a real origin, a real relay process, and readers behind it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from link import Link
from processes import Service

from longshore.errors import NotFound, Unavailable
from longshore.proto.v1 import weights_pb2, weights_pb2_grpc
from longshore.settings import JobFile
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store.version import sign_pointer
from longshore.weights.client import CanaryProbe, Copies, PolicyVersion, Tensor, VersionDraft, WeightsClient

WAIT_S = 30.0
SITE = "west"
# Of the model's one large tensor.
BYTES = 4_000_000


class World:
    """A home weight store, the link to it, a relay, and a learner's client at home."""

    def __init__(self, folder: Path, broker_url: str) -> None:
        self.job = JobRef("default", f"weights-{random.randrange(10**9)}")
        self.key = SigningKey.generate()
        self.origin = Service("weights", folder, store_url=folder / "origin")
        self.link = Link(self.origin.address)
        self.folder = folder
        self.broker_url = broker_url
        self.relay: Service | None = None
        self.weights = bytearray(random.Random(1).randbytes(BYTES))
        self.assets = {"config.json": b"{}"}
        self._clients: list[WeightsClient] = []
        self.learner = self.client(self.origin.address, copies=False)
        self.published: dict[int, bytes] = {}

    async def start(self) -> None:
        await self.link.start()
        spec = {
            "name": "mirrored",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "sites": [{"name": SITE}],
        }
        document = {
            "project": self.job.project,
            "job": self.job.job,
            "spec": spec,
            "learner_public_key": self.key.public_key.hex(),
        }
        job_file = self.folder / "job.json"
        job_file.write_text(JobFile.model_validate(document).model_dump_json())
        self.relay = Service(
            "relay",
            self.folder,
            job_file=job_file,
            site=SITE,
            broker_url=self.broker_url,
            home_broker_url="redis://127.0.0.1:9",
            home_weights=self.link.address,
            weights_dir=self.folder / "mirror",
            spool_dir=self.folder / "spool",
        )
        # Both at once: starting is most of what a test takes.
        self.origin.start()
        self.relay.start()
        await asyncio.to_thread(self.origin.wait_serving)
        await self.learner.register_key(100)
        await asyncio.to_thread(self.relay.wait_serving)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.link.stop()
        # In threads, so that connections whose other end is here can end.
        ending = [asyncio.to_thread(service.stop) for service in (self.relay, self.origin) if service is not None]
        await asyncio.gather(*ending)

    def client(self, address: str, *, copies: bool = True) -> WeightsClient:
        held = Copies[int](3, 1 << 30) if copies else None
        self._clients.append(WeightsClient(address, self.job, self.key.public_key, held))
        return self._clients[-1]

    def reader(self) -> WeightsClient:
        assert self.relay is not None
        return self.client(self.relay.address)

    async def publish(self, version: int, changes: int = 1000) -> None:
        source = random.Random(version)
        for place in source.sample(range(BYTES // 2), changes):
            self.weights[2 * place] ^= 1
        self.published[version] = bytes(self.weights)
        draft = VersionDraft(
            version, version, 1, version - 1 if version else None, (CanaryProbe((1,), ()),), time.time()
        )
        tensor = Tensor("w", "bfloat16", (BYTES // 2,), self.published[version])
        await self.learner.publish(self.key, draft, [tensor], self.assets)

    def right(self, policy: PolicyVersion) -> bool:
        assert policy.tensors is not None
        return bytes(policy.tensors[0].data) == self.published[policy.version]


@pytest.fixture
async def world(tmp_path: Path, broker_url: str) -> AsyncIterator[World]:
    world = World(tmp_path, broker_url)
    try:
        await world.start()
        yield world
    finally:
        await world.close()


async def until_version(client: WeightsClient, version: int) -> PolicyVersion:
    """Follows head to a version and fetches it."""
    async with asyncio.timeout(WAIT_S):
        async for news in client.watch():
            if news.published and news.version == version:
                return await client.fetch(version)
    raise AssertionError("the watch ended")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.02)


async def test_each_payload_crosses_the_link_once_for_many_readers(world: World) -> None:
    readers = [world.reader() for _ in range(4)]
    await world.publish(0)
    first = await asyncio.gather(*(until_version(reader, 0) for reader in readers))
    assert all(map(world.right, first))
    # Random bytes do not compress: one copy came over, not four.
    assert BYTES < world.link.down_bytes < 1.2 * BYTES
    before = world.link.down_bytes
    await world.publish(1)
    second = await asyncio.gather(*(until_version(reader, 1) for reader in readers))
    assert all(map(world.right, second))
    # A thousand changed elements of two million: a delta, once, and a manifest for each pointer.
    assert world.link.down_bytes - before < 40_000


async def test_a_site_serves_what_it_has_while_home_is_away_also_after_a_restart(world: World) -> None:
    # One after the other: a relay that is behind takes over the newest version alone.
    for version in range(2):
        await world.publish(version)
        assert world.right(await until_version(world.reader(), version))
    await world.link.stop()
    world.origin.kill()
    assert world.right(await until_version(world.reader(), 1))
    assert world.relay is not None
    world.relay.kill()
    world.relay.start().wait_serving()
    late = world.reader()
    assert world.right(await until_version(late, 1))
    assert world.right(await late.fetch(0))
    with pytest.raises((NotFound, Unavailable)):
        await late.fetch(2, timeout=3)
    world.origin.start().wait_serving()
    await world.link.start()
    await world.publish(2)
    assert world.right(await until_version(late, 2))


async def test_a_relay_that_was_away_catches_up_and_takes_only_what_it_lacks(world: World) -> None:
    await world.publish(0)
    assert world.right(await until_version(world.reader(), 0))
    await world.link.stop()
    for version in range(1, 12):
        await world.publish(version)
    before = world.link.down_bytes
    await world.link.start()
    assert world.right(await until_version(world.reader(), 11))
    assert world.link.down_bytes - before < BYTES / 4
    # And an older one that nobody here had, when somebody asks for it.
    reader = world.reader()
    assert world.right(await reader.fetch(5))
    with pytest.raises(NotFound):
        await reader.fetch(77)


async def test_a_transfer_that_breaks_goes_on_where_it_broke(world: World) -> None:
    cuts = iter([BYTES // 4, BYTES // 2, 3 * BYTES // 4])
    due = next(cuts)

    def cut(count: int) -> None:
        nonlocal due
        if count > due:
            due = next(cuts, 1 << 60)
            world.link.cut()

    world.link.on_bytes = cut
    # What is on the way when a link is cut is lost: a slow one has less of it.
    world.link.rate = 10e6
    await world.publish(0)
    assert world.right(await until_version(world.reader(), 0))
    assert due == 1 << 60
    # Started anew each time it would have been two and a half copies.
    assert world.link.down_bytes < 1.6 * BYTES


async def test_a_pointer_that_is_not_head_is_followed_when_somebody_asks_for_it(world: World) -> None:
    await world.publish(0)
    await world.publish(1)
    stub = weights_pb2_grpc.WeightsServiceStub(world.learner._channel)
    signed = sign_pointer(world.key, world.job, "channel/canary", 0, 1, time.time() + 100)
    await stub.SetPointer(weights_pb2.SetPointerRequest(pointer=signed), timeout=10)
    reader = world.reader()
    async with asyncio.timeout(WAIT_S):
        async for news in reader.watch("channel/canary"):
            if news.published:
                break
    assert news.version == 0
    assert world.right(await reader.fetch(0))
