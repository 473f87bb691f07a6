"""SIGKILL of a site's mirror in the middle of transfers, and of home in the middle of publishes that are mirrored."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from link import Link
from mirrored_site import MirroredSite
from processes import free_port

from longshore.errors import LongshoreError
from longshore.relay import mirror as mirror_module
from longshore.weight_store.layout import VersionKey
from longshore.weight_store.objects import open_objects
from longshore.weight_store.store import POLICY, WeightStore
from longshore.weights.client import WeightsClient
from tests.contract.test_weights_crash import DEADLINE_S, MortalStore

SCRIPT = Path(__file__).with_name("mirror_crash_site.py")
TESTS = Path(__file__).parents[1]
SIZE = 200_000


class MortalSite:
    """A site's mirror as a process of its own."""

    def __init__(self, folder: Path, bench: Any, home: str) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self._bench = bench
        self._arguments = [str(folder), bench.job.project, bench.job.job, bench.key.public_key.hex(), home]
        self._log = folder / "site.log"
        folder.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        paths = (TESTS.parent / "services", TESTS / "support")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        with self._log.open("ab") as log:
            argv = [sys.executable, str(SCRIPT), *self._arguments, self.address]
            self.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    async def death(self) -> None:
        assert self.process is not None
        assert await asyncio.to_thread(self.process.wait, DEADLINE_S) == -9, self._log.read_text()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def on_disk(self) -> dict[int, tuple[Any, ...]]:
        """Tensors of every version that the dead process left, read as its successor would."""
        store = WeightStore(open_objects(str(self.folder / "mirror")), mirror=True)
        numbers = store.versions(self._bench.job, POLICY, None, 100)
        return {number: store.copies.get(self._bench.job, VersionKey(POLICY, number)).tensors for number in numbers}


async def test_a_mirror_that_is_killed_in_mid_transfer_has_whole_versions_and_catches_up(weights, tmp_path) -> None:
    source = random.Random(7)
    link = await Link(weights.address).start()
    # Slow enough that a kill falls into a transfer.
    link.rate = 30e6
    site = MortalSite(tmp_path / "site", weights, link.address)
    site.start()
    try:
        await weights.publish(weights.client(), 0, size=SIZE)
        for version in range(1, 4):
            due = link.down_bytes + source.randrange(1000, SIZE * 8)

            def kill(count: int, due: int = due) -> None:
                if count > due:
                    site.kill()

            link.on_bytes = kill
            # From a new client, who publishes in full.
            await weights.publish(weights.client(), version, size=SIZE)
            await site.death()
            link.on_bytes = lambda count: None
            for number, tensors in site.on_disk().items():
                assert tensors == tuple(weights.tensors(number, SIZE))
            site.start()
        reader = WeightsClient(site.address, weights.job, weights.key.public_key)
        weights._clients.append(reader)
        async with asyncio.timeout(DEADLINE_S):
            async for version in reader.watch_head():
                if version == 3:
                    break
        assert (await reader.fetch(3)).tensors == tuple(weights.tensors(3, SIZE))
    finally:
        site.close()
        await link.stop()


# With its assets there, a publish writes blob, encoding, manifest and head. Killed before the n-th.
@pytest.mark.parametrize(("point", "published"), [(2, False), (4, True)])
async def test_what_home_had_not_published_when_it_was_killed_is_never_served(
    stopped_weights, tmp_path, monkeypatch, point: int, published: bool
) -> None:
    monkeypatch.setattr(mirror_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(mirror_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(mirror_module, "COMMIT_S", 0.2)
    bench = stopped_weights
    home = MortalStore(bench, tmp_path)
    home.start()
    await home.accepting()
    learner = bench.client()
    await learner.register_key(keep=5)
    await bench.publish(learner, 0, size=SIZE)
    site = await MirroredSite(tmp_path / "site", bench.job, bench.key.public_key, bench.address).start()
    try:
        await site.until_head(0)
        home.order.write_text(f"write {point}")
        publishing = asyncio.create_task(bench.publish(learner, 1, size=SIZE))
        await home.death()
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        # The site has had every byte of it.
        assert site.versions() == [0]
        await site.until(lambda: not site.link[-1])
        home.start()
        await home.accepting()
        # Home answers again, and has been asked what became of them.
        await site.until(lambda: site.link[-1])
        assert published or site.versions() == [0]
        # Another learner takes over, with other weights under that number if it is free.
        other, seed = bench.client(), 1
        with contextlib.suppress(LongshoreError):
            await other.publish(bench.key, bench.draft(1, epoch=2), bench.tensors(50, SIZE), bench.assets)
            seed = 50
        assert (seed == 1) is published
        await site.until_head(1)
        assert (await site.reader().fetch(1)).tensors == tuple(bench.tensors(seed, SIZE))
    finally:
        await site.close()
        home.close()
