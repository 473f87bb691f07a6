"""Channels over TLS to a server that has a name and several addresses. Real certificates, made here."""

from __future__ import annotations

import datetime
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longshore.errors import ConfigError
from longshore.rpc.channel import channel
from longshore.rpc.server import RpcServer

NAME = "generators.longshore.test"


@pytest.fixture
def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate for NAME alone, its own authority, which both sides show."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    named = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    certificate = builder.add_extension(named, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for variable, data in (("CA", certificate.public_bytes(pem)), ("CERT", certificate.public_bytes(pem))):
        path = tmp_path / f"{variable}.pem"
        path.write_bytes(data)
        monkeypatch.setenv(f"LONGSHORE_TLS_{variable}", str(path))
    (tmp_path / "key.pem").write_bytes(private)
    monkeypatch.setenv("LONGSHORE_TLS_KEY", str(tmp_path / "key.pem"))


@pytest.mark.usefixtures("certified")
async def test_an_address_is_held_to_the_name_that_it_came_from() -> None:
    server = RpcServer("127.0.0.1:0")
    await server.start()
    request = health_pb2.HealthCheckRequest()
    try:
        async with channel(server.address, name=NAME, retries=False) as named:
            answer = await health_pb2_grpc.HealthStub(named).Check(request, timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for name in ("", "another.longshore.test"):
            async with channel(server.address, name=name, retries=False) as other:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await health_pb2_grpc.HealthStub(other).Check(request, timeout=20)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.drain(0)


async def test_nothing_leaves_the_machine_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSHORE_TLS_CA", raising=False)
    with pytest.raises(ConfigError, match=r"10\.0\.0\.7:7000 is not on this machine"):
        channel("10.0.0.7:7000", name=NAME)
