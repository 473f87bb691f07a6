"""What the HTTP servers do with connections that take their time. The deadlines are short here."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.types import Receive, Scope, Send

from longshore.errors import ConfigError
from longshore.rpc import http_server
from longshore.rpc.http_server import serve_http

WAIT_S = 20.0
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"


# What was received by requests whose answers nobody read.
LEFT: list[str] = []


async def at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body; to a DELETE with more than sockets hold, and says what became of it."""
    if scope["method"] == "DELETE":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(1024 * 1024), "more_body": True})
        LEFT.append((await receive())["type"])
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def nothing(address: str) -> None:
    """Nobody needs the address."""


@pytest.fixture
async def address(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, int]]:
    monkeypatch.setattr(http_server, "_HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_server, "_REST_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_server, "_READER_TIMEOUT_S", 0.2)
    LEFT.clear()
    stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def on_listening(where: str) -> None:
        listening.set_result(where)

    serving = asyncio.create_task(serve_http(at_once, "127.0.0.1:0", 1.0, stop, on_listening))
    host, _, port = (await listening).rpartition(":")
    yield host, int(port)
    stop.set()
    await serving


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other side ends the connection."""
    received = b""
    try:
        async with asyncio.timeout(WAIT_S):
            while piece := await reader.read(1024):
                received += piece
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HEAD[:-2]])
async def test_a_head_that_does_not_come_ends_the_connection(address: tuple[str, int], sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    assert await until_closed(reader) == b""
    writer.close()


async def test_a_head_that_trickles_ends_the_connection(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)

    async def trickle() -> None:
        while True:
            writer.write(b"G")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert await until_closed(reader) == b""
    trickling.cancel()
    writer.close()


async def test_a_second_request_has_the_deadline_too(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
    assert (await until_closed(reader)).count(b"200 OK") == 1
    writer.close()


async def test_an_answered_request_need_not_be_listened_to_for_ever(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(HEAD)

    async def send_on() -> None:
        while True:
            writer.write(b"x" * 1024)
            await asyncio.sleep(0.02)

    sending = asyncio.create_task(send_on())
    assert (await until_closed(reader)).endswith(b"ok")
    sending.cancel()
    writer.close()


async def test_who_does_not_read_is_left(address: tuple[str, int]) -> None:
    _, writer = await asyncio.open_connection(*address, limit=1024)
    writer.write(b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(WAIT_S):
        while not LEFT:  # noqa: ASYNC110 - the other side's timer
            await asyncio.sleep(0.02)
    assert LEFT == ["http.disconnect"]
    writer.close()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1))
    certificate = builder.add_extension(host, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / "crt.pem").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return folder / "crt.pem", folder / "key.pem"


async def test_a_certificate_is_served(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def on_listening(where: str) -> None:
        listening.set_result(where)

    serving = asyncio.create_task(serve_http(at_once, "127.0.0.1:0", 1.0, stop, on_listening, certificate=certificate))
    address = await listening
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=WAIT_S) as client:
        assert (await client.get(f"https://{address}/")).text == "ok"
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://{address}/")
    stop.set()
    await serving


async def test_a_certificate_that_is_not_there_is_refused() -> None:
    certificate = (Path("no.crt"), Path("no.key"))
    with pytest.raises(ConfigError, match=r"certificate no\.crt"):
        await serve_http(at_once, "127.0.0.1:0", 1.0, asyncio.Event(), nothing, certificate=certificate)
