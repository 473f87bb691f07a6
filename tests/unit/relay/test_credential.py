"""Where a relay is told that its home is, and a credential that is renewed while it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from longshore.errors import ConfigError
from longshore.relay import credential
from longshore.relay.config import RelaySettings
from longshore.relay.credential import HomeAccess
from longshore.sites.authority import Authority
from longshore.sites.certificates import make_request
from longshore.sites.credential_file import SiteCredential

URL = "rediss://longshore-site-west:a%40b%3A@home.example.com:6380/0?socket_keepalive=1"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "authority")


def made(authority: Authority, days: float = 30.0, **changes: object) -> SiteCredential:
    key, request = make_request("west")
    values = {
        "site": "west",
        "project": None,
        "weights": "home.example.com:7443",
        "broker_url": URL,
        "gateway": "https://home.example.com",
        "api_key": "ls_key",
        "authority": authority.pem.decode(),
        "certificate": authority.issue_site("west", request, days).decode(),
        "private_key": key.decode(),
    }
    return SiteCredential.model_validate({**values, **changes})


def settings(**changes: object) -> RelaySettings:
    given = {"job_file": "job.json", "broker_url": "unix:///w", "spool_dir": "spool", "weights_dir": "weights"}
    return RelaySettings.model_validate({**given, **changes})


def test_the_file_says_all(tmp_path: Path, authority: Authority) -> None:
    made(authority).save(tmp_path / "west.site")
    home = HomeAccess(settings(site_file=tmp_path / "west.site"))
    assert (home.site, home.now.weights) == ("west", "home.example.com:7443")
    # Name and password are asked for with each connection, and stand in no URL.
    assert home.now.broker_url == "rediss://home.example.com:6380/0?socket_keepalive=1"
    assert home.login() == ("longshore-site-west", "a@b:")
    assert home.now.authority == authority.pem


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"site": "east"}, "LONGSHORE_SITE east: .* is of site west"),
        ({"home_weights": "x:1"}, "leave LONGSHORE_HOME_BROKER_URL and LONGSHORE_HOME_WEIGHTS out"),
        ({"site_file": "nowhere.site"}, "LONGSHORE_SITE_FILE nowhere.site: No such file"),
        ({"site_file": None, "home_weights": "x:1"}, "^LONGSHORE_HOME_BROKER_URL: set"),
        ({"site_file": None}, "LONGSHORE_HOME_BROKER_URL and LONGSHORE_HOME_WEIGHTS"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, authority: Authority, changes: dict[str, object], fault: str) -> None:
    made(authority).save(tmp_path / "west.site")
    with pytest.raises(ConfigError, match=fault):
        HomeAccess(settings(**{"site_file": tmp_path / "west.site", **changes}))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{}", "site: Field required"),
        ("nothing", "Invalid JSON"),
        ('{"site": "west", "private_key": ["s3cret"]}', "private_key: Input should be a valid string"),
    ],
)
def test_a_file_that_is_none_is_refused_without_telling_what_is_in_it(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "west.site"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=fault) as caught:
        SiteCredential.load(path)
    assert "s3cret" not in str(caught.value)


def test_a_certificate_of_another_site_is_refused(tmp_path: Path, authority: Authority) -> None:
    made(authority, site="east").save(tmp_path / "x.site")
    with pytest.raises(ConfigError, match="it is of site east, its certificate of west"):
        SiteCredential.load(tmp_path / "x.site")


async def test_a_renewed_file_is_shown_from_then_on(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential, "LOOK_S", 0.01)
    path = tmp_path / "west.site"
    made(authority, 1.0).save(path)
    home, stop, renewed = HomeAccess(settings(site_file=path)), asyncio.Event(), asyncio.Event()
    before = home.now
    told: list[float] = []
    following = asyncio.create_task(home.follow(stop, renewed.set, told.append))
    # Damaged, then of another home: what was right stays so.
    for text in (b"{", None):
        if text is None:
            made(authority, weights="elsewhere.example.com:1").save(path)
        else:
            path.write_bytes(text)
        await asyncio.sleep(0.1)
        assert home.now == before
    made(authority, 2.0, broker_url=URL.replace("a%40b%3A", "new")).save(path)
    await asyncio.wait_for(renewed.wait(), 10)
    assert home.login() == ("longshore-site-west", "new")
    assert home.now.tls != before.tls
    stop.set()
    await asyncio.wait_for(following, 10)
    assert told[0] < told[-1] == home.now.expires_at
