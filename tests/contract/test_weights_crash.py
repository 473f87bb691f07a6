"""SIGKILL of the real process at every point of a publish, and in the middle of a fetch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from longshore.errors import Unavailable
from longshore.weight_store.objects import open_objects
from longshore.weight_store.store import WeightStore
from longshore.weights.client import WeightsClient

SERVER = Path(__file__).with_name("weights_crash_server.py")
DEADLINE_S = 20.0
# A publish writes blob, assets, encoding, manifest and head; retention then removes the oldest version's manifest,
# encoding and blob. Killed before the n-th of these, the new version is published or is not.
POINTS = {
    2: False,  # a blob that nothing names
    4: False,  # all but the manifest
    5: True,  # a manifest that head does not name
    7: True,  # an encoding and a blob without their manifest
    8: True,  # a blob without its encoding
}


class MortalStore:
    """A weights process of its own on the bench's address and folder."""

    def __init__(self, bench, folder: Path, *options: str) -> None:
        self._options = options
        self.order = folder / "order"
        self._log = folder / "weights.log"
        self._env = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2] / "services"),
            "LONGSHORE_LISTEN": bench.address,
            "LONGSHORE_STORE_URL": str(bench.folder),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.order.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            argv = [sys.executable, str(SERVER), str(self.order), *self._options]
            self._process = subprocess.Popen(argv, env=self._env, stdout=log, stderr=log)

    async def accepting(self) -> None:
        """Waits until its port answers."""
        host, port = self._env["LONGSHORE_LISTEN"].split(":")
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.close()
                    return
                await asyncio.sleep(0.02)

    async def death(self) -> None:
        """Waits until it has killed itself."""
        assert self._process is not None
        code = await asyncio.to_thread(self._process.wait, DEADLINE_S)
        assert code == -9, self._log.read_text()

    def end(self) -> int:
        """SIGTERM, and its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(15)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
async def mortal(stopped_weights, tmp_path: Path) -> AsyncIterator[MortalStore]:
    store = MortalStore(stopped_weights, tmp_path)
    store.start()
    yield store
    store.close()


async def check_head(bench, client: WeightsClient, version: int) -> None:
    assert await client.head() == version
    policy = await client.fetch(version)
    assert policy.tensors == tuple(bench.tensors(version))
    assert await client.assets(policy.assets_sha256) == bench.assets


async def test_a_publish_killed_anywhere_leaves_a_whole_head_and_can_be_repeated(stopped_weights, mortal) -> None:
    bench = stopped_weights
    await mortal.accepting()
    await bench.client().register_key(keep=1)
    await bench.publish(bench.client(), 0)
    for version, (point, published) in enumerate(POINTS.items(), start=1):
        mortal.order.write_text(f"write {point}")
        # A client of its own, so that the assets are sent each time.
        publishing = asyncio.create_task(bench.publish(bench.client(), version))
        await mortal.death()
        publishing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await publishing
        mortal.start()
        # A new client, because an old one's pauses between its attempts to connect have grown.
        await mortal.accepting()
        reader = bench.client()
        await check_head(bench, reader, version if published else version - 1)
        assert await bench.publish(bench.client(), version) is published
        await check_head(bench, reader, version)
        assert await reader.versions() == [version]
    assert mortal.end() == 0
    assert len(bench.blobs) == 3, "of the kept version, and two leftovers that are too young to go"
    later = WeightStore(open_objects(str(bench.folder)), clock=lambda: time.time() + 3600)
    # One of them still has its encoding.
    assert later.collect(bench.job) == 3
    assert len(bench.blobs) == 1
    assert not list(bench.job_folder.glob("versions/policy/00000000000[0-4]/**/*"))


async def test_a_publisher_and_a_watcher_do_not_notice_a_killed_store(stopped_weights, mortal) -> None:
    bench = stopped_weights
    writer, heads = bench.client(), bench.client().watch_head()
    await writer.register_key(keep=2)
    await bench.publish(writer, 0)
    assert await anext(heads) == 0
    # Killed after blob, encoding and manifest (the assets are there): the repeated publish finds its version.
    mortal.order.write_text("write 4")
    publishing = asyncio.create_task(bench.publish(writer, 1))
    await mortal.death()
    mortal.start()
    assert await asyncio.wait_for(publishing, DEADLINE_S) is True
    assert await asyncio.wait_for(anext(heads), DEADLINE_S) == 1
    await heads.aclose()


async def test_a_fetch_goes_on_after_the_store_was_killed(stopped_weights, mortal) -> None:
    bench = stopped_weights
    client = bench.client()
    await client.register_key(keep=1)
    await bench.publish(client, 0, size=1_500_000)
    mortal.order.write_text("read 2")
    fetching = asyncio.create_task(client.fetch(0))
    await mortal.death()
    mortal.start()
    policy = await asyncio.wait_for(fetching, DEADLINE_S)
    assert policy.tensors == tuple(bench.tensors(0, 1_500_000))


async def test_a_broken_transfer_resumes_where_it_broke(weights, monkeypatch) -> None:
    client = weights.client()
    await weights.publish(client, 0, size=1_500_000)
    starts: list[int] = []
    read = WeightStore.read

    def breaking(self: WeightStore, path: str, start: int, length: int) -> bytes:
        starts.append(start)
        if len(starts) == 2:
            raise Unavailable("the disk hiccuped")
        return read(self, path, start, length)

    monkeypatch.setattr(WeightStore, "read", breaking)
    assert (await client.fetch(0)).tensors == tuple(weights.tensors(0, 1_500_000))
    assert starts[1] == starts[2] > 0, starts
