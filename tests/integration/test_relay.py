"""The relay process between two real brokers; learner and actors are played by the tests."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import tempfile
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Service
from redis.asyncio import Redis

from longshore.errors import Fenced, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.rollouts import Delivery, End, RolloutQueue
from longshore.rollout_queue.site_leases import expire
from longshore.rollout_queue.tickets import Claim, TicketQueue
from longshore.settings import JobFile
from longshore.types import JobRef, Message, Purpose, Sampling, Task, Ticket, TicketRef

SITE = "west"
WAIT_S = 30.0


class Bridge:
    """One job, its two brokers and its relay."""

    def __init__(
        self,
        folder: Path,
        home: Any,
        west: Any,
        connect: Callable[..., Redis],
        resources: dict[str, object] | None = None,
        **settings: object,
    ) -> None:
        self.job = JobRef("default", f"job-{uuid.uuid4().hex[:8]}")
        self.home, self.west = home, west
        self.home_redis, self.west_redis = connect(home.url, patience_s=5), connect(west.url, patience_s=5)
        self.tickets, self.rollouts = TicketQueue(self.home_redis, self.job), RolloutQueue(self.home_redis, self.job)
        self.site_tickets = TicketQueue(self.west_redis, self.job, SITE, max_attempts=20)
        self.site_rollouts = RolloutQueue(self.west_redis, self.job, SITE)
        spec = {
            "name": "relaying",
            "tasks": {"source": "jsonl"},
            "verifier": {"name": "exact-match"},
            "train": {"steps": 1},
            "resources": resources or {},
            "sites": [{"name": SITE}],
        }
        document = {"project": "default", "job": self.job.job, "spec": spec, "learner_public_key": "ab" * 32}
        job_file = folder / "job.json"
        job_file.write_text(JobFile.model_validate(document).model_dump_json())
        self.relay = Service(
            "relay",
            folder,
            job_file=job_file,
            site=SITE,
            broker_url=west.url,
            # Nobody answers there: tickets and weights have nothing to do with each other.
            home_weights="127.0.0.1:9",
            weights_dir=folder / "weights",
            spool_dir=folder / "spool",
            **{"allowance": 40, "home_broker_url": home.url, **settings},
        )
        self.epoch = 0
        self.out: dict[str, Ticket] = {}
        # Key -> every payload or final reason that the learner read and had not acknowledged before.
        self.read: dict[str, list[Delivery]] = {}

    async def open(self, tickets: int) -> None:
        """The learner's start, at home; the relay is not started."""
        await self.tickets.setup()
        self.epoch = await self.tickets.open_epoch()
        await self.rollouts.reconcile(self.epoch, await broker.incarnation(self.home_redis), {})
        await self.issue(tickets)

    async def issue(self, count: int) -> None:
        for number in range(len(self.out), len(self.out) + count):
            ref = TicketRef(self.job, number, 0)
            task = Task(f"task-{number}", (Message("user", "?"),), "x")
            self.out[ref.key] = Ticket(ref, 1, Purpose.TRAIN, task, Sampling(1.0, 4), self.epoch, 1.0)
        await self.tickets.issue(self.epoch, list(self.out.values())[-count:])

    # -- the site's actors -------------------------------------------------------------------------------------------

    async def claims(self, count: int) -> list[Claim]:
        """That many claims of the site's actors."""
        found: list[Claim] = []
        async with asyncio.timeout(WAIT_S):
            while len(found) < count:
                found += await self.site_tickets.claim("actor-w", count - len(found), 200)
        return found

    async def deliver(self, claims: list[Claim], by: str = "west") -> None:
        for claim in claims:
            await self.site_rollouts.deliver(claim, payload(claim, by))

    async def work(self, until: asyncio.Event) -> None:
        """Site actors that work on whatever comes, through every restart of the broker, also on what others left."""
        while not until.is_set():
            with contextlib.suppress(Unavailable, Fenced):
                for claim in await self.site_tickets.take_over("actor-w", 10, 300):
                    await self.deliver([claim], "west again")
                for claim in await self.site_tickets.claim("actor-w", 5, 50):
                    await self.deliver([claim])

    # -- the learner ---------------------------------------------------------------------------------------------------

    async def learn(self, count: int) -> None:
        """Reads until it has seen that many tickets end, without acknowledging."""
        async with asyncio.timeout(WAIT_S):
            while len(self.read) < count:
                await self.read_some()

    async def read_some(self) -> None:
        for item in await self.rollouts.read(100, 100):
            self.read.setdefault(item.ticket_key, []).append(item)

    async def checkpoint(self) -> None:
        ends = [End(item.entry_id, key, "trained") for key, items in self.read.items() for item in items]
        await self.rollouts.acknowledge(self.epoch, ends)

    async def reconcile(self) -> None:
        """What a learner without a checkpoint does when it notices that its broker restarted."""
        await self.tickets.setup()
        await self.tickets.raise_epoch(self.epoch)
        await self.tickets.issue(self.epoch, list(self.out.values()))
        await self.rollouts.reconcile(self.epoch, await broker.incarnation(self.home_redis), {})

    # -- looking -------------------------------------------------------------------------------------------------------

    async def home_states(self) -> dict[str, int]:
        return await states(Ledger(self.home_redis, self.job))

    async def site_states(self) -> dict[str, int]:
        return await states(Ledger(self.west_redis, self.job, SITE))

    async def metric(self, name: str) -> float:
        lines = await asyncio.to_thread(scrape, self.relay.metrics_address)
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"longshore_relay_{name}{{"))

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    if await condition():
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{what} did not come true: {self.relay.tail(30)}") from None

    async def until_metric(self, name: str, value: float) -> None:
        async def reached() -> bool:
            return await self.metric(name) == value

        await self.until(reached, f"{name} {value}")

    async def until_home(self, **wanted: int) -> None:
        async def reached() -> bool:
            return await self.home_states() == wanted

        await self.until(reached, f"home {wanted}")


def payload(claim: Claim, by: str) -> bytes:
    return f"{claim.ticket.ref.key} {by}".encode()


def scrape(address: str) -> list[str]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        return reply.read().decode().splitlines()


async def states(ledger: Ledger) -> dict[str, int]:
    counts = await ledger.counts()
    assert counts.balanced, counts
    return {state: number for state, number in counts.states.items() if number}


@pytest.fixture
async def bridge(
    tmp_path: Path, private_broker: Any, connect: Callable[..., Redis], request: pytest.FixtureRequest
) -> AsyncIterator[Bridge]:
    """Marked with `settings`: variables of the relay."""
    with tempfile.TemporaryDirectory(prefix="ls-west-") as folder:
        west = type(private_broker)(Path(folder))
        west.start()
        made = Bridge(tmp_path, private_broker, west, connect, **getattr(request, "param", {}))
        yield made
        await asyncio.to_thread(made.relay.stop)
        west.stop()


async def test_tickets_go_out_and_rollouts_come_home(bridge: Bridge) -> None:
    await bridge.open(50)
    bridge.relay.start().wait_serving()
    claims = await bridge.claims(40)
    assert await bridge.site_tickets.claim("actor-w", 10, 200) == []
    assert await bridge.home_states() == {"queued": 10, "running": 40}
    await bridge.deliver(claims[:19])
    await bridge.site_tickets.reject(claims[19], "prompt", "90 tokens")
    await bridge.learn(20)
    # The places that came free were filled from home.
    assert len(await bridge.claims(10)) == 10
    await bridge.until_home(running=30, delivered=19, prompt=1)
    notice = bridge.read.pop(claims[19].ticket.ref.key)
    assert [(item.payload, item.final_reason, item.detail) for item in notice] == [(None, "prompt", "90 tokens")]
    for claim in claims[:19]:
        assert [item.payload for item in bridge.read[claim.ticket.ref.key]] == [payload(claim, "west")]
        assert bridge.read[claim.ticket.ref.key][0].site == SITE
    counts = await Ledger(bridge.home_redis, bridge.job).counts()
    assert counts.by_site == {SITE: {"delivered": 19, "prompt": 1, "running": 30}}
    # The spool keeps them until a durable checkpoint covers them. (The rejected ticket has ended already.)
    await bridge.until_metric("spool_records", 19)
    await bridge.checkpoint()
    await bridge.until_metric("spool_records", 0)
    assert await bridge.metric("forwarded_total") == 20
    bridge.relay.stop()
    assert bridge.relay.process is not None
    assert bridge.relay.process.returncode == 0, bridge.relay.tail()


class LosesReplies:
    """Stands before a broker; of calls with these words in them the reply gets lost, once each, by a cut connection."""

    def __init__(self, to: Path, words: list[bytes]) -> None:
        self._to = to
        self.words = words

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_unix_connection(str(self._to))
        lost = asyncio.Event()
        await asyncio.gather(self._there(reader, to_broker, lost), self._back(from_broker, writer, lost))

    async def _there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                for word in [word for word in self.words if word in data]:
                    self.words.remove(word)
                    lost.set()
                writer.write(data)
        writer.close()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while (data := await reader.read(1 << 16)) and not lost.is_set():
                writer.write(data)
        writer.close()


async def test_tickets_in_a_reply_that_got_lost_are_worked_on(
    tmp_path: Path, private_broker: Any, connect: Callable[..., Redis]
) -> None:
    """The client must not repeat the call behind the relay's back: what the first gave would wait for hours."""
    with tempfile.TemporaryDirectory(prefix="ls-west-") as folder:
        west = type(private_broker)(Path(folder))
        west.start()
        lossy = LosesReplies(private_broker.socket, [b"_lease\r\n"])
        server = await asyncio.start_unix_server(lossy.serve, f"{folder}/lossy.sock")
        bridge = Bridge(tmp_path, private_broker, west, connect, home_broker_url=f"unix://{folder}/lossy.sock")
        try:
            await bridge.open(40)
            await asyncio.to_thread(bridge.relay.start)
            await bridge.deliver(await bridge.claims(40))
            await bridge.learn(40)
            assert lossy.words == []
        finally:
            await asyncio.to_thread(bridge.relay.stop)
            server.close()
            west.stop()


async def test_a_relay_killed_at_any_moment_loses_and_repeats_nothing(bridge: Bridge) -> None:
    dice, over = random.Random(7), asyncio.Event()
    await bridge.open(300)
    actors = asyncio.create_task(bridge.work(over))
    for _ in range(4):
        before = len(bridge.read)
        bridge.relay.start()
        async with asyncio.timeout(WAIT_S):
            while len(bridge.read) < min(before + dice.randrange(1, 60), 300):
                await bridge.read_some()
        bridge.relay.kill()
    bridge.relay.start()
    await bridge.learn(300)
    over.set()
    await actors
    assert {key: len(items) for key, items in bridge.read.items()} == dict.fromkeys(bridge.out, 1)
    await bridge.checkpoint()
    await bridge.until_metric("spool_records", 0)
    assert await bridge.home_states() == {"trained": 300}
    assert set(await bridge.site_states()) == {"forwarded"}


async def test_a_site_works_on_while_home_is_away_and_delivers_when_it_is_back(bridge: Bridge) -> None:
    await bridge.open(60)
    bridge.relay.start()
    claims = await bridge.claims(40)
    bridge.home.kill()
    await bridge.deliver(claims[:25])
    await bridge.until_metric("spool_records", 25)
    assert await bridge.metric("oldest_spooled_seconds") > 0
    # A relay that starts now serves its site all the same.
    bridge.relay.kill()
    bridge.relay.start().wait_serving()
    assert await bridge.metric("link_up") == 0
    await bridge.deliver(claims[25:30])
    await bridge.until_metric("spool_records", 30)
    bridge.home.start()
    await bridge.reconcile()
    await bridge.learn(30)
    # The rest of the allowance is in work still, and new tickets have come for the places that are free.
    await bridge.deliver(claims[30:])
    await bridge.deliver(await bridge.claims(20))
    await bridge.learn(60)
    assert {key: len(items) for key, items in bridge.read.items()} == dict.fromkeys(bridge.out, 1)
    await bridge.checkpoint()
    await bridge.until_metric("spool_records", 0)
    assert await bridge.metric("link_up") == 1


async def test_a_site_broker_that_lost_its_tail(bridge: Bridge) -> None:
    await bridge.open(30)
    bridge.relay.start().wait_serving()
    claims = await bridge.claims(30)
    size = bridge.west.append_only_file.stat().st_size
    await bridge.deliver(claims[:10])
    await bridge.learn(10)
    bridge.west.kill()
    bridge.west.lose_tail(size)
    bridge.west.start()
    # The ten are in the spool, whatever the broker thinks; the others' attempts go on.
    await bridge.until_metric("site_tickets", 20)
    await bridge.deliver(claims[10:20])
    await bridge.learn(20)
    bridge.west.kill()
    # Now it knows nothing at all: not even its functions.
    bridge.west.lose_tail(0)
    bridge.west.start()
    await bridge.deliver(await bridge.claims(10), "west anew")
    await bridge.learn(30)
    assert {key: len(items) for key, items in bridge.read.items()} == dict.fromkeys(bridge.out, 1)
    await bridge.checkpoint()
    await bridge.until_metric("spool_records", 0)
    assert await bridge.site_rollouts.covered(list(bridge.out)) == set(bridge.out)


async def test_a_home_broker_that_lost_its_tail(bridge: Bridge) -> None:
    await bridge.open(0)
    size = bridge.home.append_only_file.stat().st_size
    await bridge.issue(30)
    bridge.relay.start()
    claims = await bridge.claims(30)
    await bridge.deliver(claims[:10])
    await bridge.learn(10)
    bridge.home.kill()
    # Tickets, leases and deliveries are gone, the learner's epoch is not.
    bridge.home.lose_tail(size)
    bridge.home.start()
    await bridge.deliver(claims[10:15])
    await bridge.until_metric("spool_records", 15)
    bridge.read.clear()
    await bridge.reconcile()
    await bridge.learn(15)
    await bridge.until_home(running=15, delivered=15)
    # Nothing was started anew at the site.
    await bridge.deliver(claims[15:])
    await bridge.learn(30)
    assert {key: len(items) for key, items in bridge.read.items()} == dict.fromkeys(bridge.out, 1)


@pytest.mark.parametrize("bridge", [{"resources": {"site_lease_s": 2}}], indirect=True)
async def test_a_site_whose_lease_ran_out_is_fenced(bridge: Bridge) -> None:
    await bridge.open(3)
    bridge.relay.start()
    claims = await bridge.claims(3)
    assert bridge.relay.process is not None
    bridge.relay.process.send_signal(signal.SIGSTOP)
    await bridge.deliver(claims[:1])

    async def ran_out() -> bool:
        return await expire(bridge.home_redis, bridge.job, 2000, max_attempts=5) == 3

    await bridge.until(ran_out, "the lease")
    others = await bridge.tickets.claim("actor-h", 2, 0)
    bridge.relay.process.send_signal(signal.SIGCONT)
    keys = {claim.ticket.ref.key for claim in others}
    # The third ticket nobody had taken: the site goes on with it.
    await bridge.until_metric("held_tickets", 3 - len(keys))
    for claim in others:
        await bridge.rollouts.deliver(claim, payload(claim, "home"))
    with contextlib.suppress(Fenced):
        await bridge.deliver(claims[1:2])
    await bridge.deliver(claims[2:])
    await bridge.learn(3)
    for key, items in bridge.read.items():
        assert [item.payload for item in items] == [f"{key} {'home' if key in keys else 'west'}".encode()]

    async def lost() -> bool:
        return await bridge.metric("lost_total") >= 1

    await bridge.until(lost, "the lost tickets to be counted")
    await bridge.checkpoint()
    await bridge.until_metric("spool_records", 0)
