"""A TCP link that a test can count, cut and hold: an asyncio proxy on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Link:
    """Listens on a port of its own and passes everything on to `target` (host:port), counting what comes back."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        # Bytes from the target to whoever called.
        self.down_bytes = 0
        # Bytes a second from the target; None: as fast as it goes.
        self.rate: float | None = None
        # Called with the count after each read from the target.
        self.on_bytes: Callable[[int], None] = lambda count: None
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> Link:
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def cut(self) -> None:
        """Ends every connection; new ones are served."""
        for writer in list(self._open):
            writer.transport.abort()

    async def stop(self) -> None:
        """Ends every connection and refuses new ones, until `start`."""
        if self._server is not None:
            self._server.close()
            self.cut()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._open |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, counted=False))
                group.create_task(self._pump(far_reader, writer, counted=True))
        except* (OSError, asyncio.CancelledError):
            # Cut, or the test has ended.
            pass
        finally:
            self._open -= both
            for end in both:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        while data := await reader.read(65536):
            if counted:
                self.down_bytes += len(data)
                self.on_bytes(self.down_bytes)
                if self.rate is not None:
                    await asyncio.sleep(len(data) / self.rate)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
