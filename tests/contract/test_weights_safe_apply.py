"""Whatever a store, a link or a disk does to a version: what is held goes on being served, the fault is counted, and
the next attempt gets the right tensors from an anchor. For a generator's client, and for a relay's mirror."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mirrored_site import MirroredSite
from scripted_store import Script, ScriptedStore, head, pushed
from weight_parcels import JOB, KEY, delta_parcel, encoding_of, full_parcel, history

from longshore.errors import IntegrityError
from longshore.proto.v1 import weights_pb2
from longshore.relay import mirror as mirror_module
from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store import metrics
from longshore.weight_store.codec import delta
from longshore.weight_store.decoding import DELTA
from longshore.weight_store.version import VersionDraft
from longshore.weights.client import Copies, News, WeightsClient
from longshore.weights.parcel import Parcel, pack

WAIT_S = 20.0
TENSORS = history(3)
FULL0, FULL1 = full_parcel(0, TENSORS[0]), full_parcel(1, TENSORS[1])
DELTA1 = delta_parcel(1, TENSORS[1], 0, TENSORS[0])
BYTES1 = b"".join(DELTA1.parts)
STRANGER = SigningKey.generate()


def flipped(data: bytes) -> bytes:
    spoiled = bytearray(data)
    spoiled[len(data) // 2] ^= 4
    return bytes(spoiled)


def on_the_wrong_base() -> Parcel:
    """A delta that says it starts from version 0, and was made from other tensors."""
    data = delta.encode(TENSORS[2], TENSORS[1])
    wrong = full_parcel(1, TENSORS[1])
    wrong.header.encoding.CopyFrom(encoding_of(data, DELTA, 0))
    return Parcel(wrong.header, [data], wrong.assets_sha256)


def signed_wrongly() -> Parcel:
    """By a key that is not the job's, under the name of one that is."""
    forged = delta_parcel(1, TENSORS[1], 0, TENSORS[0], key=STRANGER)
    forged.header.manifest.key_id = KEY.key_id
    return forged


def of_another_job() -> Parcel:
    draft = VersionDraft(1, 1, 1, None, (), 1.0)
    return pack(JobRef("p", "other"), KEY, draft, TENSORS[1], {"config.json": b"{}"}, 1)


@dataclass(frozen=True)
class Case:
    """What goes wrong on the first stream between version 0 and version 1."""

    script: Script
    # In the place of the delta's bytes when they are asked for.
    spoiled: bytes | None = None


CASES = {
    "wrong base": Case(pushed(on_the_wrong_base())),
    "a flipped bit": Case(pushed(DELTA1, flipped(BYTES1)), flipped(BYTES1)),
    "a truncated chunk": Case(pushed(DELTA1, BYTES1[:-7])),
    "too many bytes": Case(pushed(DELTA1, BYTES1 + b"\0")),
    "a wrong signature": Case(pushed(signed_wrongly())),
    "an unknown key": Case(pushed(delta_parcel(1, TENSORS[1], 0, TENSORS[0], key=STRANGER))),
    "another job": Case(pushed(of_another_job())),
    "no such base": Case(pushed(delta_parcel(1, TENSORS[1], 0, TENSORS[0]))),
    "an expired pointer": Case([head(1, 2, expires_in_s=-5.0)]),
    "a replayed serial": Case([head(1, 0)]),
    "a stranger's pointer": Case([head(1, 2, key=STRANGER)]),
}
CASES["no such base"].script[0].push.path[0].encoding.base_version = 7
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


@pytest.fixture
async def store() -> AsyncIterator[ScriptedStore]:
    store = ScriptedStore()
    yield store
    await store.stop()


def scripted(store: ScriptedStore, case: Case) -> None:
    """Version 0, then the case; what follows on that stream, and on every other, is version 1's pointer."""
    begin = [*pushed(FULL0), head(0, 1)]
    store.scripts = [[*begin, *case.script, head(1, 3)], [head(0, 1), head(1, 3)]]
    store.hold(FULL0)
    store.hold(FULL1, delta=DELTA1, spoiled=case.spoiled)


def client_faults() -> float:
    kinds = ("push", "delta", "pointer")
    return sum(metrics.FAULTS.labels(JOB.project, JOB.job, kind)._value.get() for kind in kinds)


@each_case
async def test_a_client_keeps_what_it_has_and_gets_the_version_from_an_anchor(store: ScriptedStore, case: Case) -> None:
    scripted(store, case)
    copies: Copies[int] = Copies(3, 1 << 30)
    client = WeightsClient(await store.start(), JOB, KEY.public_key, copies)
    before = client_faults()
    news: list[News] = []
    served: list[object] = []
    try:
        async with asyncio.timeout(WAIT_S):
            async for item in client.watch():
                news.append(item)
                if not item.published:
                    continue
                policy = await client.fetch(item.version)
                served.append(policy.tensors)
                assert policy.tensors == tuple(TENSORS[item.version])
                if item.version == 1:
                    break
        assert served == [tuple(TENSORS[0]), tuple(TENSORS[1])]
        assert client_faults() > before
        assert (await client.fetch(0)).tensors == tuple(TENSORS[0])
        assert [item.version for item in news if item.published] == [0, 1]
    finally:
        await client.close()


async def test_a_client_that_can_get_no_way_keeps_what_it_has(store: ScriptedStore) -> None:
    scripted(store, CASES["a flipped bit"])
    store.hold(full_parcel(1, TENSORS[2]), delta=DELTA1, spoiled=flipped(BYTES1))
    client = WeightsClient(await store.start(), JOB, KEY.public_key, Copies[int](3, 1 << 30))
    try:
        assert (await client.fetch(0)).tensors == tuple(TENSORS[0])
        store._blobs[FULL1.header.encoding.sha256] = b""
        store.hold(FULL1, delta=DELTA1, spoiled=flipped(BYTES1))
        store._blobs[FULL1.header.encoding.sha256] = flipped(b"".join(FULL1.parts))
        with pytest.raises(IntegrityError):
            await client.fetch(1, timeout=5)
        assert (await client.fetch(0)).tensors == tuple(TENSORS[0])
        # Mended, it is fetched by the next attempt.
        store.hold(FULL1, delta=DELTA1)
        assert (await client.fetch(1)).tensors == tuple(TENSORS[1])
    finally:
        await client.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(mirror_module, "COMMIT_S", 0.02)


@each_case
@pytest.mark.usefixtures("quick")
async def test_a_relay_passes_nothing_on_and_gets_the_version_from_an_anchor(
    store: ScriptedStore, tmp_path: Path, case: Case
) -> None:
    scripted(store, case)
    site = await MirroredSite(tmp_path, JOB, KEY.public_key, await store.start()).start()
    reader = site.reader()
    seen: list[int] = []
    try:
        async with asyncio.timeout(WAIT_S):
            async for item in reader.watch():
                if not item.published:
                    continue
                seen.append(item.version)
                assert (await reader.fetch(item.version)).tensors == tuple(TENSORS[item.version])
                if item.version == 1:
                    break
        assert seen in ([0, 1], [1])
        assert site.faults > 0
        assert (await site.reader(copies=False).fetch(0)).tensors == tuple(TENSORS[0])
        assert (await site.reader(copies=False).fetch(1)).tensors == tuple(TENSORS[1])
    finally:
        await site.close()


@pytest.mark.usefixtures("quick")
async def test_a_relay_whose_home_has_nothing_sound_serves_the_old_version_on(
    store: ScriptedStore, tmp_path: Path
) -> None:
    scripted(store, CASES["a wrong signature"])
    store.hold(signed_wrongly())
    site = await MirroredSite(tmp_path, JOB, KEY.public_key, await store.start()).start()
    try:
        await site.until(lambda: site.faults >= 4)
        assert await site.reader().head() == 0
        assert (await site.reader().fetch(0)).tensors == tuple(TENSORS[0])
        assert await site.reader().versions() == [0]
        store.hold(FULL1)
        await site.until_head(1)
        assert (await site.reader().fetch(1)).tensors == tuple(TENSORS[1])
    finally:
        await site.close()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A tmpfs of `size` bytes on the folder; yields what gives it another size."""
    folder.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")

    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("quick")
async def test_a_full_disk_at_the_relay_leaves_the_old_version_serving(store: ScriptedStore, tmp_path: Path) -> None:
    """More than is buffered between the link and the disk, so that a reader that fails would be noticed."""
    large = history(2, size=6_000_000)
    old, new = full_parcel(0, large[0]), full_parcel(1, history(1, size=6_000_000, seed=5)[0])
    store.hold(old)
    store.hold(new)
    data = b"".join(new.parts)
    chunks = [weights_pb2.WatchResponse(chunk=data[at : at + 262144]) for at in range(0, len(data), 262144)]
    start = [*pushed(old, b"")[:1]]
    old_data = b"".join(old.parts)
    start += [weights_pb2.WatchResponse(chunk=old_data[at : at + 262144]) for at in range(0, len(old_data), 262144)]
    again = [pushed(new)[0], *chunks, head(1, 2)]
    store.scripts = [[*start, head(0, 1), *again], [head(0, 1), *again]]
    with small_disk(tmp_path / "small", 14_000_000) as resize:
        site = await MirroredSite(tmp_path / "small", JOB, KEY.public_key, await store.start()).start()
        try:
            await site.until(lambda: site.faults >= 2)
            reader = site.reader()
            assert await reader.head() == 0
            assert (await reader.fetch(0)).tensors == tuple(large[0])
            assert await reader.versions() == [0]
            assert site.link[-1] is True
            resize(64_000_000)
            await site.until_head(1)
            assert (await site.reader().fetch(1)).tensors == tuple(history(1, size=6_000_000, seed=5)[0])
        finally:
            await site.close()
