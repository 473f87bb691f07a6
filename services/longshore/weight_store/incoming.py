"""A publish that is under way: its bytes on the disk, readable by any number of watchers while they come.

Cut-through: a watcher far away has a version's bytes about when the store has them, and while the store still checks
them. Whether it may be served is another matter: that it was published is said by the pointer, after `settle(True)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import IO, cast

from longshore.errors import Unavailable
from longshore.proto.v1 import weights_pb2
from longshore.weight_store.objects import StorageFull

# Most that a chunk may have on its way in, and what it has on its way out: a transfer that breaks loses a chunk.
CHUNK_BYTES = 1024 * 1024
SENT_CHUNK_BYTES = 256 * 1024


class Incoming:
    """One encoding on its way in. Lives on one event loop; the file is unnamed and goes with its last reader."""

    def __init__(
        self, version: int, manifest: weights_pb2.SignedManifest, encoding: weights_pb2.Encoding, folder: str | None
    ) -> None:
        """Raises StorageFull."""
        self.version = version
        self.manifest = manifest
        self.encoding = encoding
        try:
            self._file = cast("IO[bytes]", tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise StorageFull(f"no room for a payload: {error.strerror}") from None
        self._received = 0
        self._broken = False
        self._grown = asyncio.Event()
        self._settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def file(self) -> IO[bytes]:
        """The bytes so far, for who stores them."""
        return self._file

    async def write(self, chunk: bytes) -> None:
        """Appends a chunk. Raises StorageFull."""
        await asyncio.to_thread(self._append, chunk)
        self._received += len(chunk)
        self._wake()

    def settle(self, published: bool) -> None:
        """Says how the publish ended. Later calls change nothing."""
        self._broken = self._received != self.encoding.size
        if not self._settled.done():
            self._settled.set_result(published)
        self._wake()

    async def settled(self) -> bool:
        """Whether the version was published, once that is known: every publish ends."""
        return await asyncio.shield(self._settled)

    def close(self) -> None:
        """Lets go of the file; who is reading goes on."""
        self._file.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[AsyncIterator[bytes]]:
        """The encoding's bytes from the first, as they come, also after `close`; to be entered before it.

        The iterator raises Unavailable when the rest will not come.
        """
        descriptor = os.dup(self._file.fileno())
        try:
            yield self._chunks(descriptor)
        finally:
            os.close(descriptor)

    async def _chunks(self, descriptor: int) -> AsyncIterator[bytes]:
        position = 0
        while position < self.encoding.size:
            grown = self._grown
            if position < self._received:
                chunk = os.pread(descriptor, min(SENT_CHUNK_BYTES, self._received - position), position)
                position += len(chunk)
                yield chunk
            elif self._broken:
                raise Unavailable(f"the publish of version {self.version} broke off")
            else:
                await grown.wait()

    def _append(self, chunk: bytes) -> None:
        try:
            self._file.write(chunk)
            self._file.flush()
        except OSError as error:
            raise StorageFull(f"no room for a payload: {error.strerror}") from None

    def _wake(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()
