"""A rollout site from its joining to its end: gateway, broker behind TLS, weight store, and the relay process."""

from __future__ import annotations

import asyncio
import json
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_bench import KEY, GatewayBench
from home_site import HomeCertificates, tls_before, weight_store
from processes import free_port
from redis.asyncio import Redis
from relay_bridge import SITE, Bridge

from longshore.client import ApiClient
from longshore.console import sites as console
from longshore.errors import ConfigError, Conflict, Forbidden, LongshoreError, NotFound, Unavailable
from longshore.gateway import driver, site_access
from longshore.gateway.site_access import SiteSettings
from longshore.relay.home_weights import HomeWeights
from longshore.rpc import site_guard
from longshore.rpc.channel import ClientTls
from longshore.signing import SigningKey
from longshore.sites import book
from longshore.sites.certificates import make_request, read_certificate
from longshore.sites.credential_file import SiteCredential
from longshore.types import JobRef
from longshore.weights.client import Tensor, VersionDraft, WeightsClient

HOME_PASSWORD = "home-password"


class HomeSite:
    """A home that sites can join: everything real but its launcher."""

    def __init__(self, folder: Path, server: Any, gateway: GatewayBench, weights: str) -> None:
        self.folder = folder
        self.server = server
        self.gateway = gateway
        self.weights = weights

    def api(self, key: str = KEY) -> ApiClient:
        return ApiClient(self.gateway.url, key)

    async def join(self, site: str = SITE, project: str | None = "default") -> Path:
        """As `longshore site join` does; the file."""
        path = self.folder / f"{site}.site"
        await console.join(site, project, 1.0, path)
        return path


@pytest.fixture
async def home(
    tmp_path: Path, private_broker: Any, connect: Callable[..., Redis], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[HomeSite]:
    for module in (book, site_guard):
        monkeypatch.setattr(module, "RECHECK_S", 0.1)
    monkeypatch.setattr(site_access, "KEEP_S", 0.2)
    monkeypatch.setattr(driver, "BLOCK_MS", 20)
    certificates = HomeCertificates(tmp_path)
    certificates.show(monkeypatch)
    private_broker.stop()
    private_broker.start("--requirepass", HOME_PASSWORD)
    private_broker.url = f"unix://:{HOME_PASSWORD}@{private_broker.socket}"
    sites_file = tmp_path / "sites.json"
    async with (
        tls_before(private_broker.socket, certificates) as port,
        weight_store(tmp_path, sites_file) as weights,
    ):
        gateway = GatewayBench(tmp_path, connect(private_broker.url))
        gateway.url = f"http://127.0.0.1:{free_port()}"
        gateway.site_settings = SiteSettings(
            weights,
            f"rediss://localhost:{port}",
            gateway.url,
            certificates.ca.read_bytes(),
            tmp_path / "sites-authority",
            sites_file,
        )
        await gateway.start()
        made = HomeSite(tmp_path, private_broker, gateway, weights)
        monkeypatch.setattr(console, "open_client", made.api)
        yield made
        await gateway.stop()


async def test_a_joined_site_works_until_it_is_revoked(
    home: HomeSite, tmp_path: Path, connect: Callable[..., Redis], capsys: pytest.CaptureFixture[str]
) -> None:
    path = await home.join()
    # For scripts: the file alone. (The gateway in this process logs to the same place.)
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    key = SigningKey.generate()
    with tempfile.TemporaryDirectory(prefix="ls-west-") as folder:
        west = type(home.server)(Path(folder))
        west.start()
        bridge = Bridge(tmp_path, home.server, west, connect, public_key=key.public_key, site_file=path)
        learner = WeightsClient(home.weights, bridge.job, key.public_key)
        try:
            await learner.register_key(keep=3)
            await bridge.open(50)
            bridge.relay.start()
            await bridge.deliver(await bridge.claims(40))
            await bridge.learn(40)
            # Rollouts are home, under the site's name; versions come the other way.
            assert {item.site for items in bridge.read.values() for item in items} == {SITE}
            await publish(learner, key, 1)
            await versions_reach(bridge, key, 1)
            await bridge.until_metric("link_up", 1)
            assert await bridge.metric("credential_expires_timestamp_seconds") > time.time()
            # A broker that restarts has forgotten its users, and the relay waits for it to be told.
            home.server.kill()
            home.server.start("--requirepass", HOME_PASSWORD)
            await bridge.issue(5)
            await bridge.deliver(await bridge.claims(5))
            await bridge.learn(45)
            async with home.api() as client:
                await client.revoke_site(SITE)
            await bridge.until_metric("link_up", 0)
            await bridge.until_metric("weights_link_up", 0)
            # It serves its site still, and keeps what it has.
            assert bridge.relay.process is not None
            assert bridge.relay.process.poll() is None
            users = await bridge.home_redis.execute_command("ACL", "USERS")
            assert users == [b"default"]
        finally:
            await learner.close()
            await asyncio.to_thread(bridge.relay.stop)
            west.stop()


async def publish(learner: WeightsClient, key: SigningKey, version: int) -> None:
    tensor = Tensor("w", "float32", (4,), bytes([version]) * 16)
    draft = VersionDraft(version, version, 1, None, (), 1_700_000_000.0)
    await learner.publish(key, draft, [tensor], {"config.json": b"{}"})


async def versions_reach(bridge: Bridge, key: SigningKey, version: int) -> None:
    """A generator of the site sees it, over the site's own plain loopback."""
    reader = WeightsClient(bridge.relay.address, bridge.job, key.public_key)
    try:
        async with asyncio.timeout(30):
            async for seen in reader.watch_head():
                if seen >= version:
                    return
    finally:
        await reader.close()


async def test_what_joining_writes_is_enough_and_is_secret(home: HomeSite) -> None:
    path = await home.join()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    credential = SiteCredential.load(path)
    assert (credential.site, credential.project, credential.weights) == (SITE, "default", home.weights)
    read = read_certificate(credential.certificate.encode())
    assert read.site == SITE
    assert read.expires_at == pytest.approx(time.time() + 86_400, abs=60)
    # No secret of it is anywhere at home: not in the database, not in the sites' file, not in a log.
    secrets = (credential.broker_url.get_secret_value().split(":")[2].split("@")[0], credential.api_key, KEY)
    written = b"".join(file.read_bytes() for file in (*home.folder.glob("jobs.db*"), home.folder / "sites.json"))
    assert read.serial.encode() in written
    for secret in (str(secrets[0]), credential.api_key.get_secret_value(), "PRIVATE KEY"):
        assert secret.encode() not in written
    assert credential.api_key.get_secret_value() not in repr(credential)
    # A second file for a name that is in use is refused, and so is a file that is there.
    async with home.api() as client:
        with pytest.raises(Conflict, match="has joined already"):
            await client.join_site(SITE, make_request(SITE)[1].decode())
    with pytest.raises(Conflict, match="exists"):
        await home.join()
    assert SiteCredential.load(path) == credential
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        SiteCredential.load(path)


async def test_a_site_renews_itself_with_its_own_key_and_can_do_nothing_else(home: HomeSite) -> None:
    path, other = await home.join(), await home.join("east")
    old = SiteCredential.load(path)
    await console.renew(path)
    new = SiteCredential.load(path)
    assert new.broker_url == old.broker_url
    assert new.certificate != old.certificate
    assert new.private_key != old.private_key
    good = {item["serial"] for item in json.loads((home.folder / "sites.json").read_text())["certificates"]}
    for credential in (old, new):
        assert read_certificate(credential.certificate.encode()).serial in good
        assert await reaches(credential)
    request = make_request("east")[1].decode()
    async with home.api(new.api_key.get_secret_value()) as client:
        with pytest.raises(Forbidden):
            await client.renew_site("east", request)
        for act in (client.jobs(), client.caller(), client.joined_sites(), client.keys(), client.revoke_site("east")):
            with pytest.raises(Forbidden):
                await act
        await client.renew_site(SITE, request)
    # A certificate for whatever name its request has: the site's own.
    async with home.api() as client:
        issued = await client.renew_site(SITE, request)
        assert read_certificate(issued["certificate"].encode()).site == SITE
        assert issued["broker_url"] is issued["api_key"] is None
        await client.revoke_site(SITE)
        with pytest.raises(NotFound):
            await client.renew_site(SITE, request)
        with pytest.raises(NotFound):
            await client.revoke_site("nobody")
        # Done twice it is done once.
        await client.revoke_site(SITE)
    # Its key is nobody's, rather than one that may not.
    with pytest.raises(Forbidden, match="neither expired nor ended"):
        await console.renew(path)
    await asyncio.sleep(0.2)
    assert [await reaches(credential) for credential in (old, new, SiteCredential.load(other))] == [False, False, True]


async def reaches(credential: SiteCredential) -> bool:
    """Whether the weight store lets it read."""
    key = credential.private_key.get_secret_value().encode()
    tls = ClientTls(credential.authority.encode(), credential.certificate.encode(), key)
    home = HomeWeights(credential.weights, JobRef("default", "job-1"), tls)
    try:
        # The job is not there; who may not ask does not hear of that.
        with pytest.raises((NotFound, Unavailable), match=r"has no|permission_denied") as answer:
            await home.keys()
    finally:
        await home.close()
    return answer.type is NotFound


async def test_sites_are_listed_with_how_they_are(home: HomeSite, capsys: pytest.CaptureFixture[str]) -> None:
    await home.join()
    await home.join("east", None)
    async with home.api() as client:
        await client.join_site("brief", make_request("brief")[1].decode(), "default", 1e-9)
        await client.revoke_site("east")
        states = {item["site"]: item["state"] for item in (await client.joined_sites())["sites"]}
        assert states == {"brief": "expired", "east": "revoked", "west": "good"}
        key = (await client.create_key("admin", "default"))["key"]
        # The name is free again.
        await client.join_site("brief", make_request("brief")[1].decode(), "default", 1.0)
    async with home.api(key) as client:
        assert [item["site"] for item in (await client.joined_sites())["sites"]] == ["brief", "west"]
        for act in (client.join_site("x", make_request("x")[1].decode(), "default"), client.revoke_site("west")):
            with pytest.raises(Forbidden, match="every project"):
                await act
    capsys.readouterr()
    await console.list_sites(False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["SITE", "PROJECT", "STATE"],
        ["brief", "default", "good"],
        ["east", "*", "revoked"],
        ["west", "default", "good"],
    ]


async def test_who_cannot_join(home: HomeSite) -> None:
    """Nor can anybody where the broker is open to all, or where no sites are taken."""
    request = make_request(SITE)[1].decode()
    async with home.api() as client:
        for unsound in ("", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"):
            with pytest.raises(LongshoreError, match="certificate request"):
                await client.join_site(SITE, unsound, "default")
        with pytest.raises(Conflict, match="home site's own name"):
            await client.join_site("home", request)
        await home.gateway.redis.config_set("requirepass", "")
        with pytest.raises(Conflict, match="give its default user a password"):
            await client.join_site(SITE, request)
        await home.gateway.stop()
        home.gateway.site_settings = None
        await home.gateway.start()
        with pytest.raises(Conflict, match="LONGSHORE_SITES_WEIGHTS"):
            await client.join_site(SITE, request)
        assert (await client.joined_sites())["sites"] == []
