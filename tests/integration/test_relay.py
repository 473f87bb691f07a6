"""The relay process between two real brokers; learner and actors are played by the tests."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from relay_bridge import SITE, WAIT_S, Bridge, payload

from longshore.errors import Fenced
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.site_leases import expire


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
