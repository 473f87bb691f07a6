"""The files of a spool: numbered segments that are appended to, read by place, and deleted whole.

What was written durably stays whatever fails later: a write that fails is taken back. Knows frames as bytes, and
nothing of keys. Every method blocks; callers make sure that one at a time writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from longshore.errors import Conflict
from longshore.rollout_queue.spool_format import MAGIC, Scanned, scan

log = structlog.get_logger()

_SUFFIX = ".spool"
_ASIDE = ".aside"


class Disk(Protocol):
    """The calls that fail when a disk is full or broken."""

    def write(self, file: int, data: memoryview) -> int: ...
    def sync(self, file: int) -> None: ...


class RealDisk:
    """The operating system's own."""

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def sync(self, file: int) -> None:
        os.fsync(file)


@dataclass(frozen=True)
class Place:
    """Where a frame lies."""

    segment: int
    offset: int
    length: int


class Segments:
    """The segment files of one folder, which this process alone owns."""

    def __init__(self, folder: Path, segment_bytes: int, disk: Disk) -> None:
        """Raises Conflict when another process owns the folder, OSError when it cannot be used."""
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._disk = disk
        self._sizes: dict[int, int] = {}
        # Newest segment number, and its file while it is being written.
        self._newest = 0
        self._file: int | None = None
        # Up to here the newest segment is on the disk for certain.
        self._durable = 0
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_folder(disk, folder.parent)
        self._lock = _locked(folder)
        self.used_bytes = 0

    @property
    def sealed(self) -> list[tuple[int, int]]:
        """(number, bytes) of each segment that is not being written."""
        return [(number, size) for number, size in self._sizes.items() if number != self.writing]

    @property
    def numbers(self) -> list[int]:
        return list(self._sizes)

    @property
    def writing(self) -> int | None:
        """The segment that takes the next frames; None: a new one will."""
        return self._newest if self._file is not None else None

    def recover(self) -> Iterator[tuple[int, Scanned]]:
        """Every whole frame, oldest first, with its segment's number; cuts torn tails off.

        A file that does not begin as a segment does is set aside: torn before it held anything, or not ours.
        """
        for path in sorted(self._folder.glob(f"[0-9]*{_SUFFIX}")):
            number = int(path.stem)
            self._newest = max(self._newest, number)
            data = path.read_bytes()
            head = data[: len(MAGIC)]
            # Zeros: a crash came between the file's size and its first bytes.
            if not MAGIC.startswith(head) and any(head):
                log.error("spool: not a segment, set aside", file=path.name, bytes=len(data))
                path.rename(path.with_suffix(_ASIDE))
                continue
            end = len(MAGIC)
            for frame in scan(data):
                end = frame.offset + frame.length
                yield number, frame
            if end < len(data):
                log.warning("spool: torn tail cut", file=path.name, bytes=len(data) - end)
                _cut(path, end)
            self._sizes[number] = min(end, len(data))
            self.used_bytes += self._sizes[number]

    def write(self, frames: Sequence[bytes], *, durable: bool) -> list[Place]:
        """Appends frames to one segment; `durable`: returns when they are on the disk.

        Raises:
            OSError: nothing was written (what was not durable before may be gone too).
        """
        file = self._open_for_write()
        number, offset = self._newest, self._sizes[self._newest]
        places = []
        try:
            _write_all(self._disk, file, b"".join(frames))
            if durable:
                self._disk.sync(file)
        except OSError:
            self._take_back(file)
            raise
        for frame in frames:
            places.append(Place(number, offset, len(frame)))
            offset += len(frame)
        self._set_size(offset)
        if durable:
            self._durable = offset
        return places

    def read(self, place: Place) -> bytes:
        """The bytes at a place. Raises OSError."""
        with self._path(place.segment).open("rb") as file:
            file.seek(place.offset)
            return file.read(place.length)

    def remove(self, number: int) -> None:
        """Deletes a segment; the one that is being written is emptied instead."""
        if number == self.writing:
            assert self._file is not None
            os.ftruncate(self._file, len(MAGIC))
            self._set_size(len(MAGIC))
            self._durable = len(MAGIC)
            return
        self._path(number).unlink(missing_ok=True)
        self.used_bytes -= self._sizes.pop(number)

    def close(self) -> None:
        self._seal()
        os.close(self._lock)

    def _open_for_write(self) -> int:
        if self._file is not None and self._sizes[self._newest] >= self._segment_bytes:
            self._seal()
        if self._file is None:
            path = self._path(self._newest + 1)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                _write_all(self._disk, file, MAGIC)
                _sync_folder(self._disk, self._folder)
            except OSError:
                os.close(file)
                path.unlink()
                raise
            self._file = file
            self._newest += 1
            self._sizes[self._newest] = 0
            self._set_size(len(MAGIC))
            self._durable = len(MAGIC)
        return self._file

    def _take_back(self, file: int) -> None:
        """Back to what is durable: a failed sync says nothing of which pages reached the disk."""
        try:
            os.ftruncate(file, self._durable)
        except OSError:
            # The tail stays until the next start finds it; nothing is written behind it.
            self._seal()
        else:
            self._set_size(self._durable)

    def _set_size(self, size: int) -> None:
        self.used_bytes += size - self._sizes[self._newest]
        self._sizes[self._newest] = size

    def _seal(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:010d}{_SUFFIX}"


def _locked(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Conflict(f"another process owns the spool {folder}") from None
    return lock


def _write_all(disk: Disk, file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[disk.write(file, left) :]


def _sync_folder(disk: Disk, folder: Path) -> None:
    """Makes a new file's name durable."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk.sync(number)
    finally:
        os.close(number)


def _cut(path: Path, size: int) -> None:
    with contextlib.closing(path.open("r+b")) as file:
        file.truncate(size)
        os.fsync(file.fileno())
