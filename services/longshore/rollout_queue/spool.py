"""What a site has finished and must not lose: rollouts on the local disk, from before they are delivered until they
are covered.

One record a ticket key; a newer one replaces it. A record is on the disk when `append` returns. Forgetting is not
synced: after a crash a forgotten record may be there again, and delivering it again is harmless (its ticket has ended,
or the same bytes are there). Knows nothing of brokers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longshore.errors import NotFound, Unavailable
from longshore.rollout_queue.spool_format import SpoolRecord, forget_frame, put_frame, read_record
from longshore.rollout_queue.spool_segments import Disk, Place, RealDisk, Segments

__all__ = ["Spool", "SpoolFull", "SpoolRecord"]

T = TypeVar("T")

SEGMENT_BYTES = 16 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Payloads below this are framed on the event loop: a thread would cost more.
_THREAD_BYTES = 256 * 1024


class SpoolFull(Unavailable):
    """There is no room for a record, by the spool's bound or the disk's; the spool is as it was."""


@dataclass
class _Append:
    """One caller's records on their way to the disk."""

    keys: list[str]
    frames: list[bytes]
    done: asyncio.Future[None]

    @property
    def size(self) -> int:
        return sum(map(len, self.frames))

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Spool:
    """Records of one process, in a folder of its own. Except for `open`, every method belongs to one event loop."""

    def __init__(self, segments: Segments, max_bytes: int) -> None:
        self._segments = segments
        self._max_bytes = max_bytes
        self._places: dict[str, Place] = {}
        # Segment number -> bytes and records of it that are still wanted.
        self._wanted: dict[int, tuple[int, int]] = {}
        self._waiting: list[_Append] = []
        self._forgotten: list[str] = []
        self._writer: asyncio.Task[None] | None = None
        # Held by whoever works on the files.
        self._files = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls, folder: Path, max_bytes: int, *, segment_bytes: int = SEGMENT_BYTES, disk: Disk | None = None
    ) -> Spool:
        """Opens or makes a spool and finds what a crash left. Blocks: call it in a thread.

        Args:
            max_bytes: bound of the files' size; tidying up may exceed it by one segment for a moment.

        Raises:
            Conflict: another process owns the folder.
            OSError: the folder cannot be used.
        """
        segments = Segments(folder, min(segment_bytes, max(max_bytes // 8, 1)), disk or RealDisk())
        spool = cls(segments, max_bytes)
        try:
            for number, frame in segments.recover():
                for key in frame.forgotten:
                    spool._drop(key)
                if frame.key is not None:
                    spool._keep(frame.key, Place(number, frame.offset, frame.length))
            spool._remove_unwanted()
        except BaseException:
            segments.close()
            raise
        return spool

    @property
    def used_bytes(self) -> int:
        """Bytes of the spool's files: at most the bound, but for the notes of what was forgotten."""
        return self._segments.used_bytes

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def wanted_bytes(self) -> int:
        """Bytes of the records alone; the rest of `used_bytes` is freed when an append needs it, or before."""
        return sum(size for size, _ in self._wanted.values())

    def keys(self) -> list[str]:
        """Keys of all records, oldest first."""
        return list(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def load(self, key: str) -> SpoolRecord:
        """A record, from the disk.

        Raises:
            NotFound: there is none of this key.
            IntegrityError: the disk gave other bytes than were written.
            OSError: it gave none.
        """
        place = self._places.get(key)
        if place is None:
            raise NotFound(f"the spool has no record of {key}")
        return read_record(self._segments.read(place))

    async def append(self, records: Sequence[SpoolRecord]) -> None:
        """Returns when the records are on the disk; all who wait at a time share one sync.

        Raises:
            SpoolFull: none of these records is there.
            OSError: the disk failed; after a restart they may be there or not.
        """
        assert not self._closed
        if not records:
            return
        if sum(len(record.payload) for record in records) < _THREAD_BYTES:
            frames = [put_frame(record) for record in records]
        else:
            frames = await asyncio.to_thread(lambda: [put_frame(record) for record in records])
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(_Append([record.key for record in records], frames, done))
        self._wake()
        await done

    def forget(self, keys: Iterable[str]) -> None:
        """Drops records that are covered; unknown keys are nothing to it."""
        dropped = [key for key in keys if self._drop(key)]
        if dropped:
            self._forgotten += dropped
            self._wake()

    def close(self) -> None:
        """Waits for a write in progress, and gives the folder back. Idempotent."""
        with self._files:
            if self._closed:
                return
            self._closed = True
            self._clean(self._take_forgotten())
            self._segments.close()

    # -- the index, on the event loop ----------------------------------------------------------------------------------

    def _keep(self, key: str, place: Place) -> None:
        self._drop(key)
        self._places[key] = place
        size, count = self._wanted.get(place.segment, (0, 0))
        self._wanted[place.segment] = size + place.length, count + 1

    def _drop(self, key: str) -> bool:
        place = self._places.pop(key, None)
        if place is None:
            return False
        size, count = self._wanted.pop(place.segment)
        if count > 1:
            self._wanted[place.segment] = size - place.length, count - 1
        return True

    def _take_forgotten(self) -> list[str]:
        taken, self._forgotten = self._forgotten, []
        return taken

    # -- the writer: one task, whose file work runs in threads ---------------------------------------------------------

    def _wake(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="spool")

    async def _write(self) -> None:
        while self._waiting or self._forgotten:
            appends, self._waiting = self._waiting, []
            forgotten = self._take_forgotten()
            try:
                await self._round(appends, forgotten)
            except Exception as error:  # noqa: BLE001 - whatever went wrong, those who wait must hear of it
                full = isinstance(error, OSError) and error.errno in _FULL
                for append in appends:
                    append.fail(SpoolFull(f"spool: {error}") if full else error)

    async def _round(self, appends: list[_Append], forgotten: list[str]) -> None:
        needed = sum(append.size for append in appends)
        if not appends or self.used_bytes + needed > self._max_bytes:
            await self._in_thread(self._clean, forgotten)
            await self._tidy(needed)
            forgotten = []
        fitting = self._fitting(appends)
        if not fitting:
            return
        frames = [frame for append in fitting for frame in append.frames]
        places = iter(await self._in_thread(self._commit, forgotten, frames))
        for append in fitting:
            for key, place in zip(append.keys, places, strict=False):
                self._keep(key, place)
            if not append.done.done():
                append.done.set_result(None)

    def _fitting(self, appends: list[_Append]) -> list[_Append]:
        fitting, used = [], self.used_bytes
        for append in appends:
            if used + append.size > self._max_bytes:
                append.fail(SpoolFull(f"spool: {used} of {self._max_bytes} bytes are used, {append.size} do not fit"))
            else:
                fitting.append(append)
                used += append.size
        return fitting

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        def alone() -> T:
            with self._files:
                if self._closed:
                    raise Unavailable("the spool is closed")
                return work(*args)

        return await asyncio.to_thread(alone)

    def _commit(self, forgotten: list[str], frames: list[bytes]) -> list[Place]:
        self._clean(forgotten)
        return self._segments.write(frames, durable=True)

    def _clean(self, forgotten: list[str]) -> None:
        self._remove_unwanted()
        if forgotten and self.used_bytes < self._max_bytes:
            # A note that does not fit is only missed after a crash.
            with contextlib.suppress(OSError):
                self._segments.write([forget_frame(forgotten)], durable=False)

    def _remove_unwanted(self) -> None:
        for number in self._segments.numbers:
            if number not in self._wanted:
                self._segments.remove(number)

    async def _tidy(self, needed: int) -> None:
        """Moves what is still wanted out of segments that are mostly waste, until `needed` bytes fit."""
        waste = sorted((self._wanted.get(number, (0, 0))[0], size, number) for number, size in self._segments.sealed)
        for wanted, size, number in waste:
            if self.used_bytes + needed <= self._max_bytes or wanted > size // 2:
                return
            moving = {key: place for key, place in self._places.items() if place.segment == number}
            places = await self._in_thread(self._moved, list(moving.values()))
            for (key, old), place in zip(moving.items(), places, strict=True):
                # It may have been forgotten meanwhile.
                if self._places.get(key) == old:
                    self._keep(key, place)
            await self._in_thread(self._clean, [])

    def _moved(self, places: list[Place]) -> list[Place]:
        return self._segments.write([self._segments.read(place) for place in places], durable=True)
