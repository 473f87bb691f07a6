from __future__ import annotations

import asyncio
import errno
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.errors import Conflict, IntegrityError, NotFound
from longshore.rollout_queue.spool import Spool, SpoolFull, SpoolRecord
from longshore.rollout_queue.spool_format import MAGIC, Scanned, forget_frame, put_frame, read_record, scan
from longshore.rollout_queue.spool_segments import RealDisk

MIB = 1024 * 1024


def record(key: str, size: int = 100, **changes: object) -> SpoolRecord:
    made = SpoolRecord(key, 2, "1700000000000-3", os.urandom(size))
    return replace(made, **changes)  # type: ignore[arg-type]


class Disk(RealDisk):
    """A disk whose calls are counted and fail when told to."""

    def __init__(self) -> None:
        self.syncs = 0
        # Bytes that still fit; None: any number.
        self.room: int | None = None
        self.fail_sync: int | None = None

    def write(self, file: int, data: memoryview) -> int:
        if self.room is not None:
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = data[: self.room]
            self.room -= len(data)
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self.syncs += 1
        if self.fail_sync is not None:
            raise OSError(self.fail_sync, os.strerror(self.fail_sync))
        super().sync(file)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "spool"


@pytest.fixture
def spool(folder: Path) -> Iterator[Spool]:
    opened = Spool.open(folder, 64 * MIB)
    yield opened
    opened.close()


def reopen(spool: Spool, folder: Path, **options: int) -> Spool:
    spool.close()
    return Spool.open(folder, options.pop("max_bytes", 64 * MIB), **options)


async def settled(spool: Spool) -> None:
    """What was forgotten has been noted: an append of nobody's waits for the writer."""
    await spool.append([record("settled")])


async def test_what_was_appended_is_there_after_a_restart_until_it_is_forgotten(spool: Spool, folder: Path) -> None:
    notice = SpoolRecord("7.1", 4, "9-0", b"", "prompt", "too lång: 90 tokens")
    large = record("7.0", 300_000, awaiting_verdict=True)
    await spool.append([large, notice])
    assert spool.keys() == ["7.0", "7.1"]
    assert spool.load("7.0") == large
    again = reopen(spool, folder)
    assert [again.load(key) for key in ("7.0", "7.1")] == [large, notice]
    again.forget(["7.0", "unknown"])
    assert again.keys() == ["7.1"]
    assert "7.0" not in again
    with pytest.raises(NotFound):
        again.load("7.0")
    await settled(again)
    last = reopen(again, folder)
    assert last.keys() == ["7.1", "settled"]
    last.close()


async def test_a_newer_record_replaces_an_older_one_of_its_key(spool: Spool, folder: Path) -> None:
    newer = record("1.0", attempt=5)
    await spool.append([record("1.0"), record("2.0")])
    await spool.append([newer])
    assert spool.load("1.0") == newer
    again = reopen(spool, folder)
    assert again.load("1.0") == newer
    assert sorted(again.keys()) == ["1.0", "2.0"]
    again.close()


async def test_those_who_append_together_share_a_sync(folder: Path) -> None:
    disk = Disk()
    spool = Spool.open(folder, 64 * MIB, disk=disk)
    before = disk.syncs
    await asyncio.gather(*(spool.append([record(f"{n}.0")]) for n in range(200)))
    assert len(spool.keys()) == 200
    # The new file's name, the first to come, and the rest together.
    assert 2 <= disk.syncs - before <= 4
    await spool.append([])
    before = disk.syncs
    await spool.append([record("200.0")])
    assert disk.syncs == before + 1
    spool.close()


async def test_a_caller_that_is_cancelled_takes_nobody_along(spool: Spool) -> None:
    tasks = [asyncio.create_task(spool.append([record(f"{n}.0")])) for n in range(20)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [index for index, result in enumerate(done) if result is not None] == [3]
    assert set(spool.keys()) >= {f"{n}.0" for n in range(20) if n != 3}


async def test_segments_go_when_all_of_them_is_forgotten(folder: Path) -> None:
    spool = Spool.open(folder, 64 * MIB, segment_bytes=10_000)
    for number in range(100):
        await spool.append([record(f"{number}.0", 1000)])
    assert len(files(folder)) >= 10
    spool.forget([f"{number}.0" for number in range(100) if number != 50])
    await settled(spool)
    # The one that holds the straggler, and the one that is being written.
    assert len(files(folder)) == 2
    assert spool.used_bytes == disk_bytes(folder)
    assert spool.load("50.0").key == "50.0"
    spool.forget(["50.0", "settled"])
    await spool.append([record("last")])
    assert len(files(folder)) == 1
    assert spool.used_bytes == disk_bytes(folder) < 300
    spool.close()


async def test_the_bound_is_kept_and_a_refusal_changes_nothing(folder: Path) -> None:
    spool = Spool.open(folder, 50_000, segment_bytes=5_000)
    kept = [record(f"{number}.0", 4_000) for number in range(11)]
    await spool.append(kept)
    used = spool.used_bytes
    results = await asyncio.gather(
        spool.append([record("a", 4_000), record("b", 4_000)]), spool.append([record("c", 100)]), return_exceptions=True
    )
    assert isinstance(results[0], SpoolFull)
    assert results[1] is None
    assert set(spool.keys()) == {item.key for item in kept} | {"c"}
    assert used < spool.used_bytes == disk_bytes(folder) <= 50_000
    spool.forget([item.key for item in kept[:3]])
    with pytest.raises(SpoolFull):
        await spool.append([record("d", 20_000)])
    spool.forget([item.key for item in kept])
    await spool.append([record("d", 20_000)])
    again = reopen(spool, folder)
    assert set(again.keys()) == {"c", "d"}
    again.close()


async def test_stragglers_do_not_hold_whole_segments(folder: Path) -> None:
    bound = 200_000
    spool = Spool.open(folder, bound, segment_bytes=10_000)
    stragglers = []
    for number in range(1000):
        item = record(f"{number}.0", 1_000)
        await spool.append([item])
        if number % 25 == 0:
            stragglers.append(item)
        else:
            spool.forget([item.key])
        assert spool.used_bytes <= bound
    assert [spool.load(item.key) for item in stragglers] == stragglers
    again = reopen(spool, folder, max_bytes=bound, segment_bytes=10_000)
    assert [again.load(item.key) for item in stragglers] == stragglers
    again.close()


@pytest.mark.parametrize("room", [0, 1, 500, 2_000])
async def test_a_full_disk_refuses_and_loses_nothing(folder: Path, room: int) -> None:
    disk = Disk()
    spool = Spool.open(folder, 64 * MIB, disk=disk)
    first = [record("1.0"), record("2.0")]
    await spool.append(first)
    disk.room = room
    for _ in range(3):
        with pytest.raises(SpoolFull):
            await spool.append([record("3.0", 4_000), record("1.0")])
    assert spool.keys() == ["1.0", "2.0"]
    assert [spool.load(item.key) for item in first] == first
    spool.forget(["2.0"])
    disk.room = None
    await spool.append([record("4.0")])
    again = reopen(spool, folder)
    assert set(again.keys()) == {"1.0", "4.0"}
    assert again.load("1.0") == first[0]
    again.close()


async def test_a_disk_that_is_full_from_the_start_leaves_no_files(folder: Path) -> None:
    disk = Disk()
    spool = Spool.open(folder, 64 * MIB, disk=disk)
    disk.room = 0
    for _ in range(3):
        with pytest.raises(SpoolFull):
            await spool.append([record("1.0")])
    assert files(folder) == []
    disk.room = None
    await spool.append([record("1.0")])
    spool.close()


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, SpoolFull), (errno.EIO, OSError)])
async def test_a_failed_sync_is_not_taken_for_success(folder: Path, number: int, kind: type[Exception]) -> None:
    disk = Disk()
    spool = Spool.open(folder, 64 * MIB, disk=disk)
    kept = record("1.0")
    await spool.append([kept])
    disk.fail_sync = number
    with pytest.raises(kind):
        await spool.append([record("2.0")])
    disk.fail_sync = None
    await spool.append([record("3.0")])
    again = reopen(spool, folder)
    assert again.keys() == ["1.0", "3.0"]
    assert again.load("1.0") == kept
    again.close()


async def fill(spool: Spool, kept: list[SpoolRecord]) -> None:
    while True:
        item = record(f"{len(kept)}.0", 10_000)
        await spool.append([item])
        kept.append(item)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
async def test_a_real_disk_that_fills_up(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount))
    if await mounted.wait() != 0:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        spool = Spool.open(mount / "spool", 64 * MIB)
        kept: list[SpoolRecord] = []
        with pytest.raises(SpoolFull):
            await fill(spool, kept)
        assert len(kept) > 10
        again = reopen(spool, mount / "spool")
        assert [again.load(item.key) for item in kept] == kept
        again.forget([item.key for item in kept])
        await again.append([record("new", 10_000)])
        again.close()
    finally:
        await (await asyncio.create_subprocess_exec("umount", str(mount))).wait()


async def test_damage_is_noticed_when_it_is_read(spool: Spool, folder: Path) -> None:
    await spool.append([record("1.0", 1000)])
    with files(folder)[0].open("r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes((byte[0] ^ 1,)))
    with pytest.raises(IntegrityError):
        spool.load("1.0")


async def test_a_folder_has_one_owner(spool: Spool, folder: Path) -> None:
    with pytest.raises(Conflict):
        Spool.open(folder, MIB)


@pytest.mark.parametrize("content", [b"", MAGIC[:3], MAGIC, bytes(4096), MAGIC + bytes(4096)])
def test_a_segment_without_a_record_is_taken_for_torn(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "0000000007.spool").write_bytes(content)
    spool = Spool.open(folder, MIB)
    assert files(folder) == []
    asyncio.run(spool.append([record("1.0")]))
    assert [path.stem for path in files(folder)] == ["0000000008"]
    spool.close()


def test_what_is_no_segment_is_set_aside(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "0000000007.spool").write_bytes(b"somebody's thesis")
    spool = Spool.open(folder, MIB)
    assert (folder / "0000000007.aside").read_bytes() == b"somebody's thesis"
    asyncio.run(spool.append([record("1.0")]))
    assert [path.stem for path in files(folder)] == ["0000000008"]
    spool.close()


KEYS = st.sampled_from(["0.0", "0.1", "1.0", "2.7", "33.12"])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.tuples(KEYS, st.integers(0, 300)), min_size=1, max_size=4)),
        st.tuples(st.just("forget"), st.lists(KEYS, min_size=1, max_size=3)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, cut=st.integers(0, 400), garbage=st.binary(max_size=40))
async def test_a_crash_at_any_byte_loses_nothing_that_was_acknowledged(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, list]], cut: int, garbage: bytes
) -> None:
    """The last append is the one in progress: the crash leaves any part of its bytes, and anything behind them."""
    folder = tmp_path_factory.getbasetemp() / f"crash-{uuid.uuid4().hex}"
    options = {"max_bytes": MIB, "segment_bytes": 700}
    spool = Spool.open(folder, **options)
    model: dict[str, SpoolRecord] = {}
    for kind, arguments in actions:
        if kind == "append":
            records = [record(key, size) for key, size in arguments]
            await spool.append(records)
            model.update({item.key: item for item in records})
        elif kind == "forget":
            spool.forget(arguments)
            for key in arguments:
                model.pop(key, None)
        else:
            spool = reopen(spool, folder, **options)
            # What was forgotten may be back; the owner would forget it again.
            spool.forget(set(spool.keys()) - set(model))
        assert set(spool.keys()) == set(model)
        assert {key: spool.load(key) for key in model} == model
    sizes = {path: path.stat().st_size for path in files(folder)}
    last = record("in progress", 300)
    await spool.append([last])
    spool.close()
    target = files(folder)[-1]
    before = sizes.get(target, 0)
    whole = target.stat().st_size
    os.truncate(target, min(before + cut, whole))
    with target.open("ab") as file:
        file.write(garbage)
    spool = Spool.open(folder, **options)
    assert spool.used_bytes == disk_bytes(folder)
    assert set(spool.keys()) >= set(model)
    assert {key: spool.load(key) for key in model} == model
    if "in progress" in spool:
        assert spool.load("in progress") == last
    after = record("after", 50)
    await spool.append([after])
    spool = reopen(spool, folder, **options)
    assert {key: spool.load(key) for key in [*model, "after"]} == {**model, "after": after}
    spool.close()
    shutil.rmtree(folder)


def test_frames_are_read_up_to_the_first_torn_byte() -> None:
    first, second = record("1.0", 30), record("2.0", 30)
    frames = [put_frame(first), forget_frame(["1.0", "ü"]), put_frame(second)]
    segment = MAGIC + b"".join(frames)
    ends = [len(MAGIC) + sum(map(len, frames[: n + 1])) for n in range(3)]
    for size in range(len(segment) + 1):
        assert len(list(scan(segment[:size]))) == sum(end <= size for end in ends)
    found = list(scan(segment))
    assert found[1] == Scanned(ends[0], len(frames[1]), None, ("1.0", "ü"))
    assert read_record(segment[found[2].offset :]) == second


@settings(max_examples=200)
@given(at=st.integers(8, 170), bit=st.integers(0, 7))
def test_no_changed_bit_passes(at: int, bit: int) -> None:
    frame = put_frame(SpoolRecord("12.3", 1, "1-0", b"x" * 140))
    at = at % len(frame)
    damaged = bytearray(frame)
    damaged[at] ^= 1 << bit
    with pytest.raises(IntegrityError):
        read_record(bytes(damaged))
    assert list(scan(MAGIC + bytes(damaged))) == []


def test_a_length_that_lies_is_not_believed() -> None:
    assert list(scan(MAGIC + struct.pack("<II", 0, 0xFFFFFFFF) + b"x" * 50)) == []
