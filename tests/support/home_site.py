"""A home site that others reach over TLS: an authority, a weight store, a broker behind TLS, and a gateway to join."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from processes import free_port

from longshore.sites.authority import Authority
from longshore.types import JobRef
from longshore.weights.client import WeightsClient
from longshore.weights.config import WeightsSettings
from longshore.weights.service import serve


class HomeCertificates:
    """The files of home's own processes: an authority's folder, and a certificate for loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "authority"
        self.authority = Authority.open(self.folder)
        certificate, key = self.authority.issue_home(["localhost", "127.0.0.1"], 1)
        self.certificate, self.key, self.ca = folder / "tls.crt", folder / "tls.key", self.folder / "ca.crt"
        self.certificate.write_bytes(certificate)
        self.key.write_bytes(key)

    @property
    def variables(self) -> dict[str, Path]:
        return {"CERT": self.certificate, "KEY": self.key, "CA": self.ca}

    def show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has this test's own process show them, as home's processes do."""
        for name, path in self.variables.items():
            monkeypatch.setenv(f"LONGSHORE_TLS_{name}", str(path))


@contextlib.asynccontextmanager
async def weight_store(folder: Path, book: Path) -> AsyncIterator[str]:
    """A weight store's own `serve` in this process, with the certificates that the environment names: its address."""
    address, stop = f"127.0.0.1:{free_port()}", asyncio.Event()
    settings = WeightsSettings(listen=address, store_url=str(folder / "store"), sites_file=book, drain_s=0.5)
    serving = asyncio.create_task(serve(settings, stop))
    client = WeightsClient(address, JobRef("default", "nobody"), b"\0" * 32)
    try:
        await client.versions(timeout=20.0)
        yield address
    finally:
        await client.close()
        stop.set()
        await asyncio.wait_for(serving, 10)


@contextlib.asynccontextmanager
async def tls_before(socket: Path, certificates: HomeCertificates) -> AsyncIterator[int]:
    """Ends TLS before a broker on a Unix socket, for the one that tests have speaks none. Yields a port on loopback."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate, certificates.key)

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_unix_connection(str(socket))
        await asyncio.gather(_pump(reader, to_broker), _pump(from_broker, writer))

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
