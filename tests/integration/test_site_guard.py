"""Who may call home's weight store over mutual TLS. Real certificates, a real store, real gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from home_site import HomeCertificates, weight_store

from longshore.errors import ConfigError
from longshore.proto.v1 import job_pb2, weights_pb2, weights_pb2_grpc
from longshore.rpc import site_guard
from longshore.rpc.channel import ClientTls, channel
from longshore.rpc.server import RpcServer
from longshore.sites import authority, book
from longshore.sites.authority import Authority
from longshore.sites.book import GoodCertificate, write_book
from longshore.sites.certificates import make_request, read_certificate

CALL_S = 10.0
# A second to users; nothing here is to wait for one.
RECHECK_S = 0.05
OWN, OTHER = job_pb2.JobRef(project="a", job="job-1"), job_pb2.JobRef(project="b", job="job-1")
DENIED = grpc.StatusCode.PERMISSION_DENIED
# What an unfinished handshake looks like to a caller.
UNREACHED = grpc.StatusCode.UNAVAILABLE


class Home:
    """A weight store that knows one site, `west`, of project a."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificates = HomeCertificates(folder)
        self.book = folder / "sites.json"
        self.address = ""
        self._channels: list[grpc.aio.Channel] = []
        self.west = self.issue("west")
        self.knows(self.west)

    def issue(self, site: str, days: float = 1.0, authority: Authority | None = None) -> ClientTls:
        key, request = make_request(site)
        certificate = (authority or self.certificates.authority).issue_site(site, request, days)
        return ClientTls(self.certificates.authority.pem, certificate, key)

    def knows(self, *sites: ClientTls, project: str | None = "a") -> None:
        good = []
        for tls in sites:
            read = read_certificate(tls.certificate)
            assert read.site is not None
            good.append(
                GoodCertificate(serial=read.serial, site=read.site, project=project, expires_at=read.expires_at)
            )
        write_book(self.book, self.certificates.authority.pem, good)

    def stub(self, tls: ClientTls | None) -> weights_pb2_grpc.WeightsServiceStub:
        """None: what the environment says, which is what home's own processes show."""
        self._channels.append(channel(self.address, tls=tls, retries=False))
        return weights_pb2_grpc.WeightsServiceStub(self._channels[-1])

    async def answer(self, tls: ClientTls | None, job: job_pb2.JobRef = OWN) -> grpc.StatusCode:
        """To a read."""
        request = weights_pb2.ListVersionsRequest(job=job, weight_set=weights_pb2.WEIGHT_SET_POLICY)
        return await code(self.stub(tls).ListVersions(request, timeout=CALL_S))

    async def close(self) -> None:
        for item in self._channels:
            await item.close()


async def code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.fixture
async def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Home]:
    for module in (book, site_guard):
        monkeypatch.setattr(module, "RECHECK_S", RECHECK_S)
    made = Home(tmp_path)
    made.certificates.show(monkeypatch)
    async with weight_store(tmp_path, made.book) as address:
        made.address = address
        yield made
        await made.close()


async def test_a_site_reads_what_its_projects_jobs_published_and_changes_nothing(home: Home) -> None:
    stub, job = home.stub(home.west), OWN
    assert await home.answer(home.west) is grpc.StatusCode.OK
    assert await home.answer(home.west, OTHER) is DENIED
    for call in (
        stub.RegisterKey(weights_pb2.RegisterKeyRequest(job=job, public_key=b"\1" * 32, keep=1), timeout=CALL_S),
        stub.RotateKey(weights_pb2.RotateKeyRequest(), timeout=CALL_S),
        stub.SetPointer(weights_pb2.SetPointerRequest(), timeout=CALL_S),
        stub.Publish(iter([weights_pb2.PublishRequest()]), timeout=CALL_S),
    ):
        assert await code(call) is DENIED
    # Reads by name, each of the other project's job.
    for call in (
        stub.GetKeys(weights_pb2.GetKeysRequest(job=OTHER), timeout=CALL_S),
        stub.GetVersion(weights_pb2.GetVersionRequest(job=OTHER, version=1), timeout=CALL_S),
        stub.ListPointers(weights_pb2.ListPointersRequest(job=OTHER), timeout=CALL_S),
        stub.Fetch(weights_pb2.FetchRequest(job=OTHER), timeout=CALL_S).read(),
        stub.Watch(weights_pb2.WatchRequest(job=OTHER), timeout=CALL_S).read(),
    ):
        assert await code(call) is DENIED
    # Home's own processes may do it all.
    request = weights_pb2.RegisterKeyRequest(job=job, public_key=b"\1" * 32, keep=1)
    assert await code(home.stub(None).RegisterKey(request, timeout=CALL_S)) is grpc.StatusCode.OK
    home.knows(home.west, project=None)
    await asyncio.sleep(2 * RECHECK_S)
    assert await home.answer(home.west, OTHER) is grpc.StatusCode.OK


async def drained(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_revoked_site_is_out_and_its_streams_too(home: Home) -> None:
    watch = home.stub(home.west).Watch(weights_pb2.WatchRequest(job=OWN), timeout=CALL_S)
    waiting = asyncio.create_task(code(drained(watch)))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    home.knows()
    assert await waiting is DENIED
    assert await home.answer(home.west) is DENIED
    # Gone altogether, or damaged: nobody is let in.
    home.book.write_text("{")
    await asyncio.sleep(2 * RECHECK_S)
    assert await home.answer(home.west) is DENIED
    assert await home.answer(None) is grpc.StatusCode.OK


async def test_what_expires_while_a_connection_lives_is_good_no_more(home: Home) -> None:
    brief = home.issue("west", days=2 / 86_400)
    home.knows(brief)
    await asyncio.sleep(2 * RECHECK_S)
    stub = home.stub(brief)
    assert await code(drained(stub.Watch(weights_pb2.WatchRequest(job=OWN), timeout=CALL_S))) is DENIED
    assert time.time() >= read_certificate(brief.certificate).expires_at
    # The same connection, whose handshake was long ago.
    request = weights_pb2.ListVersionsRequest(job=OWN, weight_set=weights_pb2.WEIGHT_SET_POLICY)
    assert await code(stub.ListVersions(request, timeout=CALL_S)) is DENIED


async def test_who_is_not_known_is_refused(home: Home, tmp_path: Path) -> None:
    stranger = Authority.open(tmp_path / "stranger")
    expired, unknown = home.issue("west", days=1e-9), home.issue("west")
    home.knows(home.west, expired, home.issue("north", authority=stranger))
    await asyncio.sleep(2 * RECHECK_S)
    # Another authority's word, and one that has expired, do not get through the handshake.
    assert await home.answer(home.issue("west", authority=stranger)) is UNREACHED
    assert await home.answer(expired) is UNREACHED
    # Neither does who shows nothing, or speaks no TLS.
    nothing = grpc.ssl_channel_credentials(home.certificates.authority.pem)
    for opened in (grpc.aio.secure_channel(home.address, nothing), grpc.aio.insecure_channel(home.address)):
        async with opened as plain:
            call = weights_pb2_grpc.WeightsServiceStub(plain).GetKeys(weights_pb2.GetKeysRequest(), timeout=3.0)
            assert await code(call) in (UNREACHED, grpc.StatusCode.DEADLINE_EXCEEDED)
    # Signed, and never written down: a certificate that the gateway does not know of is nobody's.
    assert await home.answer(unknown) is DENIED
    # One that is written down as another site's.
    home.knows(home.west)
    page = home.book.read_text().replace('"west"', '"east"')
    home.book.write_text(page)
    await asyncio.sleep(2 * RECHECK_S)
    assert await home.answer(home.west) is DENIED


async def test_a_site_trusts_its_own_homes_authority_alone(home: Home, tmp_path: Path) -> None:
    other = Authority.open(tmp_path / "other").pem
    fooled = ClientTls(other, home.west.certificate, home.west.key)
    assert await home.answer(fooled) is UNREACHED


async def test_an_authority_that_sites_join_by_later_is_let_in_without_a_restart(home: Home, tmp_path: Path) -> None:
    """The operator's own authority vouches for home, and the gateway makes one for sites at the first join."""
    sites = Authority.open(tmp_path / "sites")
    north = home.issue("north", authority=sites)
    assert await home.answer(north) is UNREACHED
    read = read_certificate(north.certificate)
    good = GoodCertificate(serial=read.serial, site="north", project="a", expires_at=read.expires_at)
    write_book(home.book, sites.pem, [good])
    await asyncio.sleep(2 * RECHECK_S)
    assert await home.answer(north) is grpc.StatusCode.OK


async def test_a_certificate_of_the_same_authority_is_not_homes_for_that(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a mark is nobody's, unless it is the very one that the server shows."""
    signer = home.certificates.authority
    marked = ClientTls(signer.pem, *signer.issue_home(["localhost"], 1))
    monkeypatch.setattr(authority, "HOME_URI", "urn:something-else")
    unmarked = ClientTls(signer.pem, *signer.issue_home(["localhost", "127.0.0.1"], 1))
    assert [await home.answer(tls) for tls in (marked, unmarked)] == [grpc.StatusCode.OK, DENIED]
    home.certificates.certificate.write_bytes(unmarked.certificate)
    home.certificates.key.write_bytes(unmarked.key)
    assert [await home.answer(tls) for tls in (marked, unmarked)] == [grpc.StatusCode.OK] * 2


async def test_a_site_that_home_takes_none_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without a book: whoever its authority vouches for may call it, sites excepted."""
    certificates = HomeCertificates(tmp_path)
    certificates.show(monkeypatch)
    key, request = make_request("west")
    west = ClientTls(certificates.authority.pem, certificates.authority.issue_site("west", request, 1), key)
    server = RpcServer("127.0.0.1:0")
    await server.start()
    codes = []
    for tls in (west, None):
        async with channel(server.address, tls=tls, retries=False) as opened:
            check = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            codes.append(await code(check))
    await server.drain(0)
    assert codes == [DENIED, grpc.StatusCode.OK]


@pytest.mark.parametrize("missing", ["CA", "CERT", "KEY"])
def test_nothing_listens_to_others_without_asking_who_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    HomeCertificates(tmp_path).show(monkeypatch)
    monkeypatch.delenv(f"LONGSHORE_TLS_{missing}")

    async def start() -> None:
        await RpcServer("0.0.0.0:0").start()

    with pytest.raises(ConfigError, match="LONGSHORE_TLS_"):
        asyncio.run(start())
