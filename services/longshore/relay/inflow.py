"""The bytes of a path on their way from home to the site's store, through however many streams they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from longshore.errors import LongshoreError, Rejected
from longshore.proto.v1 import weights_pb2

# Chunks that may wait for the disk; more hold up the link.
BUFFERED_CHUNKS = 8


class Inflow:
    """The encodings of one path, one after another. Lives on one event loop; one writer, one reader."""

    def __init__(self, path: Sequence[weights_pb2.PathStep]) -> None:
        """A single encoding is held as far as its reader is slow; several are held whole, to be decoded together."""
        self._encodings = [step.encoding for step in path]
        self.size = sum(encoding.size for encoding in self._encodings)
        self.received = 0
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(BUFFERED_CHUNKS if len(path) == 1 else 0)
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def whole(self) -> bool:
        return self.received == self.size

    @property
    def failed(self) -> bool:
        """Whether it is of no use to go on."""
        return self._outcome.done() and self._outcome.exception() is not None

    @property
    def next(self) -> tuple[bytes, int, int]:
        """What comes next: SHA-256 of the encoding, the offset in it, and the bytes that it still lacks."""
        offset = self.received
        for encoding in self._encodings:
            if offset < encoding.size:
                return encoding.sha256, offset, encoding.size - offset
            offset -= encoding.size
        raise AssertionError("nothing is missing")

    async def add(self, chunk: bytes) -> None:
        """Takes the next bytes, when there is room. Raises what it was failed with, and Rejected: too many bytes."""
        self.received += len(chunk)
        if self.received > self.size:
            self.fail(Rejected("chunk", f"more than the {self.size} bytes that were announced"))
        put = asyncio.ensure_future(self._chunks.put(chunk))
        try:
            # A reader that has failed takes no more.
            await asyncio.wait((put, self._outcome), return_when=asyncio.FIRST_COMPLETED)
            if self._outcome.done():
                self._outcome.result()
        finally:
            put.cancel()

    def confirm(self) -> None:
        """The bytes are those of a published version, and are all there."""
        if not self._outcome.done():
            self._outcome.set_result(None)

    def fail(self, reason: LongshoreError) -> None:
        """No more will come, or the version was not published, or who takes the bytes cannot."""
        if not self._outcome.done():
            self._outcome.set_exception(reason)
            # Whoever waits is told; without one, nobody needs to be.
            self._outcome.exception()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes from the first. Raises what the inflow was failed with."""
        taken = 0
        while taken < self.size:
            get = asyncio.ensure_future(self._chunks.get())
            try:
                await asyncio.wait((get, self._outcome), return_when=asyncio.FIRST_COMPLETED)
                if self._outcome.done():
                    self._outcome.result()
                    # Confirmed: the rest is in the queue.
                    await get
            finally:
                get.cancel()
            chunk = get.result()
            taken += len(chunk)
            yield chunk

    async def payloads(self) -> list[bytes]:
        """Every encoding's bytes, in the path's order. Raises what the inflow was failed with."""
        data = b"".join([chunk async for chunk in self.chunks()])
        found, start = [], 0
        for encoding in self._encodings:
            found.append(data[start : start + encoding.size])
            start += encoding.size
        return found

    async def confirmed(self) -> None:
        """Waits until the version is known to be published. Raises what the inflow was failed with."""
        await asyncio.shield(self._outcome)
