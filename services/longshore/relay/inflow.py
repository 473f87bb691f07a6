"""An encoding's bytes on their way from home to the site's store, through however many streams they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from longshore.errors import LongshoreError, Rejected

# Chunks that may wait for the disk; more hold up the link.
BUFFERED_CHUNKS = 8


class Inflow:
    """One encoding. Lives on one event loop; one writer, one reader."""

    def __init__(self, sha256: bytes, size: int, buffered: int | None = BUFFERED_CHUNKS) -> None:
        """
        Args:
            buffered: chunks held for a reader that is slow; None: all, for a reader that comes last.
        """
        self.sha256 = sha256
        self.size = size
        self.received = 0
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(buffered or 0)
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def whole(self) -> bool:
        return self.received == self.size

    async def add(self, chunk: bytes) -> None:
        """Takes the next bytes, when there is room. Raises Rejected: more than was announced."""
        self.received += len(chunk)
        if self.received > self.size:
            raise Rejected("chunk", f"more than the {self.size} bytes that were announced")
        put = asyncio.ensure_future(self._chunks.put(chunk))
        try:
            # A reader that has failed takes no more.
            await asyncio.wait((put, self._outcome), return_when=asyncio.FIRST_COMPLETED)
        finally:
            put.cancel()

    def confirm(self) -> None:
        """The bytes are those of a published version."""
        if not self._outcome.done():
            self._outcome.set_result(None)

    def fail(self, reason: LongshoreError) -> None:
        """No more will come, or the version was not published."""
        if not self._outcome.done():
            self._outcome.set_exception(reason)
            # Whoever takes the bytes is told; without one, nobody needs to be.
            self._outcome.exception()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes from the first. Raises what the inflow was failed with."""
        taken = 0
        while taken < self.size:
            get = asyncio.ensure_future(self._chunks.get())
            try:
                await asyncio.wait((get, self._outcome), return_when=asyncio.FIRST_COMPLETED)
                if not get.done():
                    self._outcome.result()
                    # Confirmed: the rest is in the queue, or will be.
                    await get
            finally:
                get.cancel()
            chunk = get.result()
            taken += len(chunk)
            yield chunk

    async def confirmed(self) -> None:
        """Waits until the version is known to be published. Raises what the inflow was failed with."""
        await asyncio.shield(self._outcome)
