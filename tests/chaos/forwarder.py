"""Carries connections between two places: `python -m chaos.forwarder LISTEN TO [LISTEN TO ...]`.

LISTEN is host:port. TO is host:port, unix:PATH, or file:PATH of a file that holds one of these and is read for each
connection. One of it at each end of a link lets a site whose processes speak to loopback only reach another.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

_CHUNK = 256 * 1024
_CONNECT_S = 5.0


async def forward(listen: str, to: str) -> None:
    """Serves for ever."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_CONNECT_S):
                other_reader, other_writer = await _connect(to)
        except (OSError, TimeoutError, ValueError):
            writer.close()
            return
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))

    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(serve, host, int(port), limit=_CHUNK)
    async with server:
        await server.serve_forever()


async def _connect(to: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if to.startswith("file:"):
        to = (await asyncio.to_thread(Path(to.removeprefix("file:")).read_text)).strip()
    if to.startswith("unix:"):
        return await asyncio.open_unix_connection(to.removeprefix("unix:"), limit=_CHUNK)
    host, _, port = to.rpartition(":")
    return await asyncio.open_connection(host, int(port), limit=_CHUNK)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction; when it ends, so does the connection."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _main(pairs: list[tuple[str, str]]) -> None:
    await asyncio.gather(*(forward(listen, to) for listen, to in pairs))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))))
