"""The test's own bookkeeping of a broker, against the real one: what Longshore's queue does, read from the file."""

import asyncio
from pathlib import Path

import pytest

from chaos.broker_tap import BrokerTap
from chaos.shadow import Now
from longshore.rollout_queue import broker


@pytest.fixture
async def bench(private_broker, make_bench, connect):
    made = make_bench(connect(private_broker.url))
    # By default a server whose disk is busy writes a moment later, and we would look too early.
    await made.redis.config_set("appendfsync", "always")
    return made


@pytest.fixture
def tap(private_broker):
    return BrokerTap("home", Path(private_broker.folder))


def queue_of(tap, bench):
    tap.catch_up()
    return tap.shadow.queue(str(bench.job), "home")


async def test_the_file_tells_issues_attempts_deliveries_and_ends(bench, tap):
    epoch = await bench.issued(4)
    claims = await bench.tickets.claim("actor-0", 3, 0)
    for claim in claims[:2]:
        assert await bench.rollouts.deliver(claim, b"rollout of " + claim.ticket.ref.key.encode())
    await bench.tickets.give_back(claims[2], "drain")
    found = await bench.rollouts.read(10, 0)
    await bench.end(epoch, {item.ticket_key: item.entry_id for item in found[:1]}, {found[0].ticket_key: "trained"})
    queue = queue_of(tap, bench)
    history = queue.history
    assert set(history.issued) == {"0.0", "0.1", "0.2", "0.3"}
    assert history.attempts == 3
    assert history.given_back == 1
    assert sorted(history.deliveries) == sorted(claim.ticket.ref.key for claim in claims[:2])
    assert history.endings == {found[0].ticket_key: ["trained"]}
    assert history.checks >= 6
    assert history.failures == []
    counts = await bench.ledger.counts()
    assert queue.now.counts["issued"] == counts.issued == 4
    assert len(queue.now.tickets) == 3


async def test_a_count_that_moves_alone_is_noticed(bench, tap):
    await bench.issued(2)
    assert queue_of(tap, bench).history.failures == []
    await bench.redis.hincrby(bench.keys.counts, "state:queued@home", -1)
    assert "not the sum" in queue_of(tap, bench).history.failures[0]


async def test_a_ticket_that_vanishes_uncounted_is_noticed(bench, tap):
    await bench.issued(2)
    await bench.redis.hdel(bench.keys.live, "0.1")
    assert "the tickets are" in queue_of(tap, bench).history.failures[0]


async def test_a_ticket_issued_again_after_its_end_is_noticed(bench, tap):
    epoch = await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, b"rollout")
    (found,) = await bench.rollouts.read(1, 0)
    await bench.end(epoch, {"0.0": found.entry_id}, {"0.0": "trained"})
    assert queue_of(tap, bench).history.issued_after_end == []
    await bench.tickets.issue(epoch, bench.some(1))
    assert queue_of(tap, bench).history.issued_after_end == ["0.0"]


async def test_a_broker_that_lost_its_tail_goes_back_and_the_history_stays(private_broker, make_bench, connect, tap):
    bench = make_bench(connect(private_broker.url))
    await bench.redis.config_set("appendfsync", "always")
    epoch = await bench.issued(1)
    tap.catch_up()
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, b"rollout")
    (found,) = await bench.rollouts.read(1, 0)
    await bench.end(epoch, {"0.0": found.entry_id}, {"0.0": "trained"})
    queue = queue_of(tap, bench)
    private_broker.kill()
    # Three marks: before all of it, after the issue, and after all of it.
    loss = tap.lose_tail(0.0)
    assert loss is not None
    assert loss.size == 0
    tap._go_back(tap._marks[1])
    assert list(queue.now.tickets) == ["0.0"]
    assert queue.history.endings == {"0.0": ["trained"]}
    assert queue.now.counts["issued"] == 1


async def test_losing_the_tail_brings_the_broker_back_to_an_earlier_state(private_broker, make_bench, connect, tap):
    bench = make_bench(connect(private_broker.url))
    await bench.redis.config_set("appendfsync", "always")
    await bench.issued(1)
    await bench.redis.config_set("appendfsync", "always")
    tap.catch_up()
    early = len(tap._marks)
    epoch = await bench.tickets.open_epoch()
    await bench.tickets.issue(epoch, bench.some(3))
    tap.catch_up()
    assert len(tap._marks) > early
    while len(tap._marks) > early:
        tap._marks.pop()
    private_broker.kill()
    before = private_broker.append_only_file.stat().st_size
    loss = tap.lose_tail(0.0)
    assert loss is not None
    assert loss.size > 0
    assert private_broker.append_only_file.stat().st_size == before - loss.size
    private_broker.start()
    await broker.ping(bench.redis)
    queue = queue_of(tap, bench)
    assert (await bench.ledger.counts()).issued == queue.now.counts["issued"] == 1
    assert len(queue.history.issued) == 3
    # Tickets that were lost with the tail may be issued again: that is no breach.
    await bench.tickets.issue(await bench.tickets.open_epoch(epoch), bench.some(3))
    assert queue_of(tap, bench).history.issued_after_end == []
    assert queue.now.unbalanced() == ""


def test_an_empty_queue_balances():
    assert Now().unbalanced() == ""


async def test_what_the_broker_counted_stays_when_it_forgets_a_job(bench, tap):
    epoch = await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, b"rollout")
    (found,) = await bench.rollouts.read(1, 0)
    await bench.end(epoch, {"0.0": found.entry_id}, {"0.0": "trained"})
    await broker.forget_job(bench.redis, bench.job)
    counts = queue_of(tap, bench).now.counts
    assert {name: number for name, number in counts.items() if number} == {"issued": 1, "state:trained@home": 1}


async def test_a_file_that_the_server_rewrote_and_removed_is_read_to_its_end(private_broker, make_bench, connect, tap):
    bench = make_bench(connect(private_broker.url))
    await bench.redis.config_set("appendfsync", "always")
    await bench.issued(1)
    tap.catch_up()
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    first = tap._file.path
    await bench.redis.bgrewriteaof()
    for _ in range(1000):
        if first.exists():
            await asyncio.sleep(0.02)
    assert not first.exists()
    await bench.rollouts.deliver(claim, b"rollout")
    assert queue_of(tap, bench).history.attempts == 1
    assert len(queue_of(tap, bench).history.deliveries["0.0"]) == 1
