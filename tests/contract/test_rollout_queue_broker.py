"""What the queues do when the broker is killed, restarted, full, replaced by an empty one, or not there."""

import asyncio
import contextlib
import hashlib

import pytest
import redis.exceptions

from longshore.errors import ConfigError, Fenced, Unavailable
from longshore.rollout_queue import broker
from longshore.rollout_queue.broker import BrokerFull, BrokerLost
from longshore.rollout_queue.rollouts import End, RolloutQueue
from longshore.rollout_queue.tickets import TicketQueue


async def restart(server, after_s=0.3):
    server.kill()
    await asyncio.sleep(after_s)
    await asyncio.to_thread(server.start)


async def synced(bench):
    """Returns once everything written so far is in the append-only file."""
    for _ in range(500):
        state = await bench.redis.info("persistence")
        if not state["aof_pending_bio_fsync"] and not state["aof_buffer_length"]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the broker does not flush")


class Learner:
    """Trains on everything it is given, and tells a broker that restarted what is still out."""

    def __init__(self, bench, epoch, tickets):
        self.bench = bench
        self.epoch = epoch
        self.outstanding = {ticket.ref.key: ticket for ticket in tickets}
        self.incarnations: list[str] = []
        self.done = False

    async def work(self, restarts):
        while self.outstanding or len(self.incarnations) <= restarts or await self.bench.live():
            await self.reconcile()
            found = await self.bench.rollouts.read(4, 50)
            ends = [End(item.entry_id, item.ticket_key, "trained") for item in found]
            await self.bench.rollouts.acknowledge(self.epoch, ends)
            for item in found:
                self.outstanding.pop(item.ticket_key, None)
        self.done = True

    async def reconcile(self):
        incarnation = await broker.incarnation(self.bench.redis)
        if incarnation not in self.incarnations:
            self.incarnations.append(incarnation)
            await self.bench.tickets.issue(self.epoch, list(self.outstanding.values()))


async def act(bench, learner):
    while not learner.done:
        found = await bench.tickets.claim("actor-0", 8, 50)
        for claim in found or await bench.tickets.take_over("actor-0", 8, 1_000):
            with contextlib.suppress(Fenced):
                await bench.rollouts.deliver(claim, claim.ticket.ref.key.encode() * 50)


async def kill_often(server, learner, times):
    for number in range(1, times + 1):
        await asyncio.sleep(0.1)
        await restart(server, after_s=0.2)
        # Each incarnation is to be seen by the learner: two kills in a row would be one.
        for _ in range(1000):
            if len(learner.incarnations) > number:
                break
            await asyncio.sleep(0.02)


async def test_work_goes_on_through_a_killed_broker(private_broker, connect, make_bench):
    home, away = (connect(private_broker.url) for _ in range(2))
    bench = make_bench(home)
    epoch = await bench.issued(200)
    learner = Learner(bench, epoch, bench.some(200))
    await learner.reconcile()
    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        group.create_task(learner.work(restarts=3))
        group.create_task(act(make_bench(away, bench.job), learner))
        group.create_task(kill_often(private_broker, learner, 3))
    # `states` checks the equation. Fewer than 200 if a kill took counts with it: never another state.
    assert set(await bench.states()) == {"trained"}


async def test_a_blocked_claim_survives_a_restart(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    epoch = await bench.issued(0)
    waiting = asyncio.create_task(bench.tickets.claim("actor-0", 1, 8_000))
    await asyncio.sleep(0.1)
    await restart(private_broker)
    await bench.tickets.issue(epoch, bench.some(1))
    assert len(await asyncio.wait_for(waiting, 10)) == 1


async def test_a_learner_restores_a_broker_that_lost_its_tail(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    await bench.issued(4)
    (kept,) = await bench.tickets.claim("actor-0", 1, 0)
    await synced(bench)
    size = private_broker.append_only_file.stat().st_size
    # Everything from here on is lost: an epoch, an issue, an attempt, a delivery.
    epoch = await bench.tickets.open_epoch()
    await bench.tickets.issue(epoch, bench.some(6))
    (lost,) = await bench.tickets.claim("actor-1", 1, 0)
    await bench.rollouts.deliver(kept, b"rollout")
    (delivery,) = await bench.rollouts.read(8, 0)
    await synced(bench)
    private_broker.kill()
    private_broker.lose_tail(size)
    private_broker.start()

    assert await bench.states() == {"queued": 3, "running": 1}
    await bench.tickets.setup()
    assert await bench.tickets.raise_epoch(epoch) == epoch
    # The learner holds 0.0's rollout; all others are outstanding by its own ledger.
    assert await bench.tickets.issue(epoch, bench.some(6)[1:]) == 2
    await bench.rollouts.acknowledge(epoch, [End(delivery.entry_id, delivery.ticket_key, "trained")])
    assert await bench.states() == {"queued": 5, "trained": 1}
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(kept, b"rollout")
    # An attempt that the broker has forgotten hands in what it made.
    assert await bench.rollouts.deliver(lost, b"rollout")
    claims = await bench.tickets.claim("actor-1", 8, 0)
    assert sorted(claim.ticket.ref.key for claim in claims) == ["0.2", "0.3", "1.0", "1.1"]
    for claim in claims:
        await bench.rollouts.deliver(claim, b"again")
    assert len(await bench.rollouts.read(8, 0)) == 5
    assert await bench.states() == {"delivered": 5, "trained": 1}


async def test_an_attempt_of_a_lost_life_is_not_mistaken_for_one_of_the_new(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    epoch = await bench.issued(0)
    await synced(bench)
    size = private_broker.append_only_file.stat().st_size
    await bench.tickets.issue(epoch, bench.some(1))
    (old,) = await bench.tickets.claim("actor-0", 1, 0)
    private_broker.kill()
    private_broker.lose_tail(size)
    private_broker.start()
    await bench.tickets.issue(epoch, bench.some(1))
    (new,) = await bench.tickets.claim("actor-1", 1, 0)
    assert new.attempt == old.attempt == 1
    assert await bench.tickets.renew("actor-0", [old]) == [old]
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(old, b"old")
    assert await bench.rollouts.deliver(new, b"new")


async def test_an_empty_broker_is_set_up_by_whoever_comes_first(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    await bench.issued(3)
    (claim, *_) = await bench.tickets.claim("actor-0", 3, 0)
    await bench.redis.flushall()
    await bench.redis.function_flush()
    with pytest.raises(Fenced, match="has ended"):
        await bench.rollouts.deliver(claim, b"x")
    assert await bench.tickets.claim("actor-0", 8, 0) == []
    assert await bench.tickets.take_over("actor-0", 8, 0) == []
    assert await bench.rollouts.read(8, 0) == []
    assert await bench.rollouts.read_pending() == []
    assert await bench.tickets.renew("actor-0", [claim]) == [claim]
    assert await bench.tickets.issue(1, bench.some(3)) == 3
    assert await bench.states() == {"queued": 3}


async def test_setup_again_changes_nothing(bench):
    await bench.issued(3)
    await bench.tickets.claim("actor-0", 1, 0)
    await bench.tickets.setup()
    assert await bench.states() == {"queued": 2, "running": 1}
    assert len(await bench.tickets.claim("actor-0", 8, 0)) == 2


async def test_two_releases_share_a_broker(bench, monkeypatch):
    await bench.issued(2)
    source = broker._SOURCE + "-- the next release\n"
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    with monkeypatch.context() as newer:
        newer.setattr(broker, "VERSION", version)
        newer.setattr(broker, "_CODE", source.replace("@VERSION@", version))
        await bench.tickets.setup()
        (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    libraries = {library[b"library_name"] for library in await bench.redis.function_list()}
    assert {f"longshore_{version}".encode(), f"longshore_{broker.VERSION}".encode()} <= libraries
    assert await bench.rollouts.deliver(claim, b"by the older release")


async def test_a_full_broker_takes_nothing_new_and_lets_go_of_the_old(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    epoch = await bench.issued(4)
    delivered, held, other = await bench.tickets.claim("actor-0", 3, 0)
    await bench.rollouts.deliver(delivered, b"x")
    (delivery,) = await bench.rollouts.read(8, 0)
    await bench.redis.config_set("maxmemory", "1mb")
    with pytest.raises(BrokerFull, match="memory is full"):
        await bench.rollouts.deliver(held, b"x")
    with pytest.raises(BrokerFull, match="memory is full"):
        await bench.tickets.issue(epoch, bench.some(8))
    assert await bench.tickets.renew("actor-0", [held, other]) == []
    await bench.tickets.give_back(other, "drain")
    await bench.rollouts.acknowledge(epoch, [End(delivery.entry_id, delivery.ticket_key, "trained")])
    await bench.tickets.close(await bench.tickets.open_epoch(), "cancelled")
    assert await bench.states() == {"trained": 1, "cancelled": 3}


async def test_whoever_frees_a_full_brokers_memory_can_start_anew(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    epoch = await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, b"x")
    await bench.redis.config_set("maxmemory", 1)
    again = make_bench(bench.redis, bench.job)
    await again.tickets.setup()
    (delivery,) = await again.rollouts.read(8, 0)
    assert await again.tickets.open_epoch() == epoch + 1
    await again.rollouts.acknowledge(epoch + 1, [End(delivery.entry_id, delivery.ticket_key, "trained")])
    assert await bench.states() == {"trained": 1}
    # What is missing is not there for being full.
    with pytest.raises(BrokerFull):
        await make_bench(bench.redis).tickets.setup()
    await bench.redis.function_flush()
    with pytest.raises(BrokerFull):
        await again.tickets.setup()


async def test_a_broker_that_can_write_nothing_down_is_waited_for(private_broker, connect, make_bench):
    private_broker.kill()
    private_broker.start("--save", "3600 1")
    bench = make_bench(connect(private_broker.url))
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    in_the_way = private_broker.folder / "dump.rdb"
    in_the_way.mkdir()
    await saved(bench.redis, "err")
    for call in (bench.rollouts.deliver(claim, b"x"), bench.rollouts.read(1, 0), bench.tickets.setup()):
        with pytest.raises(Unavailable, match="MISCONF"):
            await call
    in_the_way.rmdir()
    await saved(bench.redis, "ok")
    await bench.redis.config_set("min-replicas-to-write", 1)
    with pytest.raises(Unavailable, match="NOREPLICAS"):
        await bench.rollouts.deliver(claim, b"x")
    await bench.redis.config_set("min-replicas-to-write", 0)
    assert await bench.rollouts.deliver(claim, b"x")


async def saved(client, outcome: str) -> None:
    """Has the server save its data, with this outcome."""
    await client.bgsave()
    for _ in range(1000):
        said = await client.info("persistence")
        if not said["rdb_bgsave_in_progress"]:
            break
        await asyncio.sleep(0.01)
    assert said["rdb_last_bgsave_status"] == outcome


async def test_a_broker_that_stays_away_is_an_error_within_the_clients_patience(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url, patience_s=0.5))
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    # While the disk is busy, even a server's death alone loses what it has not written yet.
    await bench.redis.waitaof(1, 0, 10_000)
    private_broker.kill()
    for attempt in (
        bench.tickets.claim("actor-0", 1, 100),
        bench.rollouts.deliver(claim, b"x"),
        bench.rollouts.read(1, 100),
        bench.ledger.counts(),
        broker.ping(bench.redis),
        broker.incarnation(bench.redis),
        bench.tickets.setup(),
    ):
        with pytest.raises(BrokerLost):
            await asyncio.wait_for(attempt, 10)
    assert issubclass(BrokerLost, Unavailable)
    assert issubclass(BrokerLost, redis.exceptions.ConnectionError)
    private_broker.start()
    await broker.ping(connect(private_broker.url))
    assert await bench.rollouts.deliver(claim, b"x")


async def test_wrong_credentials_are_told_at_once(private_broker, connect):
    owner = connect(private_broker.url)
    await owner.config_set("requirepass", "right")
    with pytest.raises(ConfigError, match="credentials"):
        await asyncio.wait_for(broker.ping(connect(f"{private_broker.url}?password=wrong")), 5)
    await broker.ping(connect(f"{private_broker.url}?password=right"))


@pytest.mark.parametrize("url", ["http://example.org", "nonsense", "redis://host:port", "unix:///x?db=none"])
def test_a_malformed_url_is_a_configuration_error(url):
    with pytest.raises(ConfigError, match="broker URL"):
        broker.connect(url)


async def test_forgetting_a_job_leaves_nothing_of_it_and_all_of_the_others(bench, make_bench):
    # A name that would match everything if it were taken as a pattern.
    starred = make_bench(bench.redis, type(bench.job)("default", "*"))
    neighbour = make_bench(bench.redis, type(bench.job)("default", f"{bench.job.job}-2"))
    for one in (bench, starred, neighbour):
        await one.issued(600)
        (claim,) = await one.tickets.claim("actor-0", 1, 0)
        await one.rollouts.deliver(claim, b"x")
    await broker.forget_job(bench.redis, bench.job)
    await broker.forget_job(bench.redis, starred.job)
    assert await bench.states() == {}
    assert [name async for name in bench.redis.scan_iter(f"ls:{{{bench.job}}}:*")] == []
    assert await neighbour.states() == {"queued": 599, "delivered": 1}
    await broker.forget_job(bench.redis, neighbour.job)


async def test_a_finished_job_holds_little(bench):
    epoch = await bench.issued(200)
    for claim in await bench.tickets.claim("actor-0", 200, 0):
        await bench.rollouts.deliver(claim, b"x" * 5000)
    found = await bench.rollouts.read(200, 0)
    await bench.rollouts.acknowledge(epoch, [End(item.entry_id, item.ticket_key, "trained") for item in found])
    names = [name async for name in bench.redis.scan_iter(f"ls:{{{bench.job}}}:*")]
    assert sum([await bench.redis.memory_usage(name) for name in names]) < 20_000


async def test_queues_need_no_setup_of_their_own(bench):
    """An actor may start before the learner."""
    assert await TicketQueue(bench.redis, bench.job).claim("actor-0", 1, 0) == []
    assert await RolloutQueue(bench.redis, bench.job).read(1, 0) == []
