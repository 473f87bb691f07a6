"""What lies between sites: leases of hours, what a site may forget, and counts by site."""

import asyncio

import pytest

from longshore.errors import Conflict, Fenced, NotFound, Unavailable
from longshore.rollout_queue import broker, site_leases
from longshore.rollout_queue.rollouts import End, RolloutQueue
from longshore.rollout_queue.site_leases import SiteLeases
from longshore.rollout_queue.tickets import TicketQueue


@pytest.fixture
def west(bench):
    return SiteLeases(bench.redis, bench.job, "west")


async def by_site(bench):
    await bench.states()
    return (await bench.ledger.counts()).by_site


async def test_a_leased_ticket_is_out_of_reach_of_the_home_actors(bench, west):
    await bench.issued(3)
    first, second = await west.lease(2)
    assert [claim.ticket.ref.key for claim in (first, second)] == ["0.0", "0.1"]
    assert first.ticket == bench.ticket(0, 0)
    assert await bench.tickets.take_over("actor-0", 8, 0) == []
    assert [claim.ticket.ref.key for claim in await bench.tickets.claim("actor-0", 8, 0)] == ["0.2"]
    assert await by_site(bench) == {"west": {"running": 2}, "home": {"running": 1}}


async def test_a_sites_rollout_goes_home_under_its_name(bench, west):
    epoch = await bench.issued(2)
    claims = await west.lease(2)
    relay = RolloutQueue(bench.redis, bench.job, maker="west")
    outcomes = await relay.deliver_many([(claim, b"tokens", False) for claim in (*claims, claims[0])])
    assert outcomes == [True, True, False]
    deliveries = await bench.rollouts.read(8, 0)
    assert [(item.site, item.payload) for item in deliveries] == [("west", b"tokens")] * 2
    assert await by_site(bench) == {"west": {"delivered": 2}}
    await bench.rollouts.acknowledge(epoch, [End(item.entry_id, item.ticket_key, "trained") for item in deliveries])
    assert await by_site(bench) == {"west": {"trained": 2}}


async def test_each_of_many_deliveries_stands_by_itself(bench, west):
    await bench.issued(3)
    first, second, third = await west.lease(3)
    await west.give_back(second, "drain")
    (anew,) = await bench.tickets.claim("actor-0", 1, 0)
    relay = RolloutQueue(bench.redis, bench.job, maker="west")
    outcomes = await relay.deliver_many([(claim, b"x", False) for claim in (first, second, third)])
    assert outcomes[0] is outcomes[2] is True
    assert isinstance(outcomes[1], Fenced)
    assert anew.ticket.ref == second.ticket.ref


async def test_what_is_spooled_at_a_site_is_counted_so(bench, west):
    await bench.issued(2)
    first, second = await west.lease(2)
    assert await west.renew([(first, True), (second, False)]) == []
    assert await by_site(bench) == {"west": {"spooled": 1, "running": 1}}
    assert await RolloutQueue(bench.redis, bench.job, maker="west").deliver(first, b"x")
    assert await west.renew([(first, True), (second, False)]) == [first]


async def test_a_lease_is_anothers_only_when_it_has_run_out_and_nothing_is_queued(bench, west):
    await bench.issued(2)
    (leased,) = await west.lease(1)
    east = SiteLeases(bench.redis, bench.job, "east", lease_ms=50)
    await asyncio.sleep(0.06)
    assert [claim.ticket.ref.key for claim in await east.lease(8)] == ["0.1"]
    await west.renew([(leased, False)])
    assert await east.lease(8) == []
    await asyncio.sleep(0.06)
    await west.renew([(leased, False)])
    assert [claim.ticket.ref.key for claim in await east.lease(8)] == ["0.1"]
    await asyncio.sleep(0.06)
    again = await east.lease(8)
    assert {claim.ticket.ref.key: claim.attempt for claim in again} == {"0.0": 2, "0.1": 3}
    with pytest.raises(Fenced):
        await RolloutQueue(bench.redis, bench.job, maker="west").deliver(leased, b"late")
    assert await west.renew([(leased, False)]) == [leased]


async def test_a_lease_that_ran_out_goes_back_to_the_queue_and_its_late_rollout_counts(bench, west):
    await bench.issued(2)
    early, late = await west.lease(2)
    assert await site_leases.expire(bench.redis, bench.job, 3_600_000, max_attempts=5) == 0
    assert await site_leases.expire(bench.redis, bench.job, 0, max_attempts=5) == 2
    assert await by_site(bench) == {"home": {"queued": 2}}
    relay = RolloutQueue(bench.redis, bench.job, maker="west")
    assert await relay.deliver(early, b"late but welcome")
    (claim,) = await bench.tickets.claim("actor-0", 8, 0)
    assert claim.ticket.ref == late.ticket.ref
    with pytest.raises(Fenced):
        await relay.deliver(late, b"too late")
    assert await by_site(bench) == {"home": {"running": 1}, "west": {"delivered": 1}}


async def test_a_relay_that_forgot_everything_is_told_what_it_holds(bench, west):
    await bench.issued(1203)
    taken = [claim for _ in range(3) for claim in await west.lease(500)]
    await west.reject(taken[0], "too_long", "")
    held = await SiteLeases(bench.redis, bench.job, "west").held()
    assert sorted(claim.fence for claim in held) == sorted(claim.fence for claim in taken[1:])
    assert await SiteLeases(bench.redis, bench.job, "east").held() == []


async def test_work_that_the_broker_forgot_is_adopted(bench, west):
    """After a tail loss the learner has issued the ticket again, and the site still works on it."""
    await bench.issued(3)
    await bench.tickets.claim("actor-0", 1, 0)
    (claim,) = await west.adopt(["0.0", "0.2", "7.7"])
    assert (claim.ticket.ref.key, claim.attempt) == ("0.2", 1)
    assert await by_site(bench) == {"home": {"queued": 1, "running": 1}, "west": {"running": 1}}


async def test_a_sites_failure_ends_the_ticket_and_tells_the_learner(bench, west):
    await bench.issued(1)
    (claim,) = await west.lease(1)
    await west.reject(claim, "attempts_exhausted", "it killed five actors")
    (notice,) = await bench.rollouts.read(8, 0)
    assert (notice.final_reason, notice.site, notice.detail) == ("attempts_exhausted", "west", "it killed five actors")
    assert await by_site(bench) == {"west": {"attempts_exhausted": 1}}


async def test_only_what_the_frontier_covers_may_be_forgotten(bench):
    epoch = await bench.issued(3)
    trained, waiting, _ = await bench.tickets.claim("actor-0", 3, 0)
    await bench.rollouts.deliver(trained, b"1")
    await bench.rollouts.deliver(waiting, b"2")
    keys = ["0.0", "0.1", "0.2"]
    assert await bench.rollouts.covered(keys) is None
    await bench.rollouts.reconcile(epoch, await broker.incarnation(bench.redis), {})
    assert await bench.rollouts.covered(keys) == set()
    await bench.rollouts.acknowledge(epoch, [End(None, "0.0", "trained")])
    assert await bench.rollouts.covered(keys) == {"0.0"}


async def test_a_new_incarnation_covers_nothing_until_the_learner_has_reconciled(private_broker, connect, make_bench):
    bench = make_bench(connect(private_broker.url))
    epoch = await bench.issued(2)
    told = await broker.incarnation(bench.redis)
    await bench.rollouts.reconcile(epoch, told, {})
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, b"x")
    await bench.rollouts.acknowledge(epoch, [End(None, "0.0", "trained")])
    assert await bench.rollouts.covered(["0.0"]) == {"0.0"}
    await asyncio.sleep(1.2)  # appendfsync everysec
    private_broker.kill()
    private_broker.start()
    assert await bench.rollouts.covered(["0.0"]) is None
    # Whoever has not noticed the restart has told this one nothing.
    with pytest.raises(Unavailable, match="has restarted"):
        await bench.rollouts.reconcile(epoch, told, {("home", "trained"): 1})
    assert await bench.rollouts.covered(["0.0"]) is None
    # The learner's ledger knows of more that ended than the broker does.
    finals = {("home", "trained"): 3, ("west", "trained"): 2}
    await bench.rollouts.reconcile(epoch, await broker.incarnation(bench.redis), finals)
    assert await bench.rollouts.covered(["0.0", "0.1"]) == {"0.0"}
    counts = await bench.ledger.counts()
    assert (counts.issued, counts.balanced) == (6, True)
    assert counts.by_site == {"home": {"queued": 1, "trained": 3}, "west": {"trained": 2}}


async def test_an_old_learner_cannot_reconcile(bench):
    epoch = await bench.issued(1)
    await bench.tickets.open_epoch()
    with pytest.raises(Fenced):
        await bench.rollouts.reconcile(epoch, await broker.incarnation(bench.redis), {})


async def test_a_verdict_that_comes_later(bench):
    epoch = await bench.issued(2)
    claim, other = await bench.tickets.claim("actor-0", 2, 0)
    with pytest.raises(Conflict, match="awaits no verdict"):
        await bench.rollouts.deliver_verdict("0.0", b"early")
    await bench.rollouts.deliver(claim, b"unscored", awaiting_verdict=True)
    await bench.rollouts.deliver(other, b"scored")
    assert await bench.states() == {"awaiting_verdict": 1, "delivered": 1}
    await bench.rollouts.deliver_verdict("0.0", b"verdict")
    with pytest.raises(Conflict):
        await bench.rollouts.deliver_verdict("0.0", b"another")
    with pytest.raises(NotFound):
        await bench.rollouts.deliver_verdict("9.9", b"verdict")
    assert await bench.states() == {"delivered": 2}
    unscored, scored, verdict = await bench.rollouts.read(8, 0)
    assert (unscored.awaiting_verdict, unscored.payload) == (True, b"unscored")
    assert (scored.awaiting_verdict, verdict.payload, verdict.verdict) == (False, None, b"verdict")
    await bench.rollouts.acknowledge(epoch, [End(verdict.entry_id, "0.0", "trained"), End(None, "0.1", "trained")])
    assert await bench.states() == {"trained": 2}
    assert await bench.redis.xlen(bench.keys.rollouts) == 0


async def test_two_sites_queues_share_a_broker_and_a_job(bench, west):
    """As a test of a relay may have it: both tiers on one server."""
    epoch = await bench.issued(1)
    (leased,) = await west.lease(1)
    there = TicketQueue(bench.redis, bench.job, "west")
    await there.setup()
    await there.issue(await there.open_epoch(), [leased.ticket])
    (claim,) = await there.claim("actor-0", 1, 0)
    assert claim.ticket == leased.ticket
    assert await bench.tickets.raise_epoch(epoch) == epoch
    await RolloutQueue(bench.redis, bench.job, "west").deliver(claim, b"x")
    assert await by_site(bench) == {"west": {"running": 1}}
