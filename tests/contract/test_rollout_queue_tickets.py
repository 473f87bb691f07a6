"""Tickets on the real broker: every rule of issue, claim, renew, take over, give back, reject and close."""

import asyncio
import os

import pytest

from longshore.errors import Fenced, Rejected
from longshore.proto.v1 import ticket_pb2
from longshore.rollout_queue import broker, tickets
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.rollouts import End
from longshore.rollout_queue.tickets import TicketQueue
from longshore.types import Purpose, Task, Ticket


async def dead_letters(bench):
    return [fields for _, fields in await bench.redis.xrange(bench.keys.dead)]


async def test_a_ticket_comes_out_as_it_went_in(bench):
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    assert claim.ticket == bench.ticket(0, 0)
    assert claim.attempt == 1
    assert await bench.states() == {"running": 1}


async def test_claims_come_in_order_of_issue_and_only_once(bench):
    await bench.issued(5)
    first = await bench.tickets.claim("actor-0", 3, 0)
    second = await bench.tickets.claim("actor-1", 3, 0)
    assert [claim.ticket.ref.key for claim in first + second] == ["0.0", "0.1", "0.2", "0.3", "1.0"]
    assert await bench.tickets.claim("actor-2", 3, 0) == []


async def test_a_waiting_claim_gets_a_ticket_as_soon_as_it_is_issued(bench):
    epoch = await bench.issued(0)
    waiting = asyncio.create_task(bench.tickets.claim("actor-0", 4, 5_000))
    await asyncio.sleep(0.05)
    await bench.tickets.issue(epoch, bench.some(1))
    assert len(await asyncio.wait_for(waiting, 4)) == 1


async def test_issue_knows_its_tickets_in_every_live_state(bench):
    epoch = await bench.issued(3)
    delivered, _running = await bench.tickets.claim("actor-0", 2, 0)
    await bench.rollouts.deliver(delivered, b"rollout")
    assert await bench.tickets.issue(epoch, bench.some(4)) == 1
    assert await bench.states() == {"queued": 2, "running": 1, "delivered": 1}
    assert (await bench.ledger.counts()).issued == 4


async def test_issue_of_many_tickets_takes_several_calls(bench):
    epoch = await bench.issued(1201)
    assert await bench.tickets.issue(epoch, bench.some(1201)) == 0
    assert await bench.states() == {"queued": 1201}


async def test_an_oversized_ticket_is_refused(bench):
    epoch = await bench.issued(0)
    good = bench.ticket()
    task = Task("big", (), answer="x" * (5 * 1024 * 1024))
    big = Ticket(good.ref, 4, Purpose.TRAIN, task, good.sampling, learner_epoch=1, issued_at=0.0)
    with pytest.raises(Rejected, match="oversized"):
        await bench.tickets.issue(epoch, [big])
    assert await bench.states() == {}


async def test_epochs_only_grow(bench):
    await bench.tickets.setup()
    assert [await bench.tickets.open_epoch() for _ in range(3)] == [1, 2, 3]
    assert await bench.tickets.open_epoch(at_least=10) == 11
    assert await bench.tickets.open_epoch(at_least=5) == 12
    assert await bench.tickets.raise_epoch(20) == 20
    assert await bench.tickets.raise_epoch(4) == 20
    assert await bench.tickets.open_epoch() == 21


async def test_an_older_epoch_can_neither_issue_nor_close(bench):
    old = await bench.issued(2)
    await bench.tickets.open_epoch()
    with pytest.raises(Fenced, match="superseded by 2"):
        await bench.tickets.issue(old, bench.some(3))
    with pytest.raises(Fenced):
        await bench.tickets.close(old, "cancelled")
    assert await bench.states() == {"queued": 2}


async def test_an_epoch_that_the_broker_forgot_counts_again(bench):
    epoch = await bench.issued(1)
    await bench.tickets.issue(epoch + 5, bench.some(2))
    with pytest.raises(Fenced):
        await bench.tickets.issue(epoch, bench.some(3))
    assert await bench.tickets.open_epoch() == epoch + 6


LEASE_MS = 60_000


async def test_only_an_idle_ticket_is_taken_over(bench):
    await bench.issued(1)
    (old,) = await bench.tickets.claim("actor-0", 1, 0)
    assert await bench.tickets.take_over("actor-1", 8, LEASE_MS) == []
    await bench.age([old])
    (new,) = await bench.tickets.take_over("actor-1", 8, LEASE_MS)
    assert (new.ticket, new.attempt) == (old.ticket, 2)
    assert await bench.tickets.take_over("actor-2", 8, LEASE_MS) == []
    assert await bench.states() == {"running": 1}


async def test_the_queues_own_lease_is_the_default(bench, make_bench):
    bench = make_bench(bench.redis, lease_ms=LEASE_MS)
    await bench.issued(1)
    claims = await bench.tickets.claim("actor-0", 1, 0)
    assert await bench.tickets.take_over("actor-1", 8) == []
    await bench.age(claims)
    assert len(await bench.tickets.take_over("actor-1", 8)) == 1


async def test_renewing_keeps_others_away(bench):
    await bench.issued(1)
    claims = await bench.tickets.claim("actor-0", 1, 0)
    await bench.age(claims)
    assert await bench.tickets.renew("actor-0", claims) == []
    assert await bench.tickets.take_over("actor-1", 8, LEASE_MS) == []


async def test_renew_says_what_is_lost(bench):
    epoch = await bench.issued(4)
    taken, ended, delivered, kept = await bench.tickets.claim("actor-0", 4, 0)
    await bench.rollouts.deliver(delivered, b"rollout")
    await bench.rollouts.acknowledge(epoch, [])
    await bench.tickets.reject(ended, "too_long", "")
    # Everything that still runs is idle; the other actor takes the first one only.
    (_,) = await bench.tickets.take_over("actor-1", 1, 0)
    assert await bench.tickets.renew("actor-0", [taken, ended, delivered, kept]) == [taken, ended, delivered]
    assert await bench.tickets.renew("actor-0", []) == []


async def test_take_over_looks_beyond_tickets_that_are_not_idle(bench):
    await bench.issued(40)
    claims = await bench.tickets.claim("actor-0", 40, 0)
    await bench.age(claims[39:])
    (taken,) = await bench.tickets.take_over("actor-1", 1, LEASE_MS)
    assert taken.ticket == claims[39].ticket


async def test_take_over_goes_on_where_the_last_call_stopped(bench, monkeypatch):
    monkeypatch.setattr(tickets, "_MAX_SCANS", 1)
    await bench.issued(40)
    claims = await bench.tickets.claim("actor-0", 40, 0)
    await bench.age(claims[39:])
    found = [claim for _ in range(8) for claim in await bench.tickets.take_over("actor-1", 1, LEASE_MS)]
    assert [claim.ticket for claim in found] == [claims[39].ticket]


async def test_a_silent_actors_attempts_run_out(bench, make_bench):
    bench = make_bench(bench.redis, max_attempts=2)
    await bench.issued(1)
    await bench.tickets.claim("actor-0", 1, 0)
    (last,) = await bench.tickets.take_over("actor-1", 1, 0)
    assert last.attempt == 2
    assert await bench.tickets.take_over("actor-2", 1, 0) == []
    assert await bench.states() == {"attempts_exhausted": 1}
    (letter,) = await dead_letters(bench)
    assert (letter[b"kind"], letter[b"key"], letter[b"reason"]) == (b"ticket", b"0.0", b"attempts_exhausted")
    assert ticket_pb2.Ticket.FromString(letter[b"payload"]).task.task_id == "task-0"
    (notice,) = await bench.rollouts.read(8, 0)
    assert (notice.ticket_key, notice.payload, notice.final_reason) == ("0.0", None, "attempts_exhausted")
    assert notice.attempt == 2
    with pytest.raises(Fenced, match="has ended"):
        await bench.rollouts.deliver(last, b"too late")


async def test_a_ticket_given_back_is_there_for_the_next_actor(bench):
    await bench.issued(2)
    first, _ = await bench.tickets.claim("actor-0", 2, 0)
    await bench.tickets.give_back(first, "generator_lost")
    assert await bench.states() == {"queued": 1, "running": 1}
    (again,) = await bench.tickets.claim("actor-1", 8, 0)
    assert (again.ticket, again.attempt) == (first.ticket, 2)
    with pytest.raises(Fenced, match="no longer held"):
        await bench.rollouts.deliver(first, b"from the first holder")
    await bench.tickets.give_back(first, "generator_lost")
    assert await bench.states() == {"running": 2}


async def test_failed_attempts_run_out_and_drained_ones_do_not_count(bench, make_bench):
    bench = make_bench(bench.redis, max_attempts=2)
    await bench.issued(1)
    for attempt in (1, 2, 3):
        (claim,) = await bench.tickets.claim("actor-0", 1, 0)
        # Drained attempts get a number of their own all the same: it is what fences their holders.
        assert claim.attempt == attempt
        await bench.tickets.give_back(claim, "drain")
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.tickets.give_back(claim, "verifier_lost")
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.tickets.give_back(claim, "verifier_lost")
    assert await bench.states() == {"attempts_exhausted": 1}
    (letter,) = await dead_letters(bench)
    assert letter[b"detail"] == b"verifier_lost"
    assert (await bench.rollouts.read(1, 0))[0].final_reason == "attempts_exhausted"


async def test_a_rejected_ticket_is_final(bench):
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.tickets.reject(claim, "prompt_too_long", "70 tokens, 64 fit")
    await bench.tickets.reject(claim, "prompt_too_long", "again")
    assert await bench.states() == {"prompt_too_long": 1}
    (letter,) = await dead_letters(bench)
    assert (letter[b"reason"], letter[b"detail"]) == (b"prompt_too_long", b"70 tokens, 64 fit")
    (notice,) = await bench.rollouts.read(8, 0)
    assert notice.final_reason == "prompt_too_long"


async def test_a_superseded_actor_cannot_reject_or_give_back(bench):
    await bench.issued(1)
    (old,) = await bench.tickets.claim("actor-0", 1, 0)
    (new,) = await bench.tickets.take_over("actor-1", 1, 0)
    await bench.tickets.reject(old, "prompt_too_long", "")
    await bench.tickets.give_back(old, "drain")
    assert await bench.states() == {"running": 1}
    assert await bench.rollouts.deliver(new, b"rollout")


@pytest.mark.parametrize("reason", ["queued", "delivered", "Not A Word", ""])
async def test_a_final_reason_must_not_look_like_a_state(bench, reason):
    epoch = await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    with pytest.raises(ValueError):
        await bench.tickets.reject(claim, reason, "")
    with pytest.raises(ValueError):
        await bench.tickets.close(epoch, reason)


async def test_close_ends_everything_that_is_not_final(bench):
    epoch = await bench.issued(6)
    delivered, trained, running = await bench.tickets.claim("actor-0", 3, 0)
    await bench.rollouts.deliver(delivered, b"1")
    await bench.rollouts.deliver(trained, b"2")
    entries = {item.ticket_key: item.entry_id for item in await bench.rollouts.read(8, 0)}
    await bench.end(epoch, entries, {trained.ticket.ref.key: "trained"})
    assert await bench.tickets.close(epoch, "cancelled") == {"queued": 3, "running": 1, "delivered": 1}
    assert await bench.tickets.close(epoch, "cancelled") == {}
    assert await bench.states() == {"cancelled": 5, "trained": 1}
    assert await bench.tickets.claim("actor-1", 8, 0) == []
    assert await bench.tickets.take_over("actor-1", 8, 0) == []
    assert await bench.tickets.renew("actor-0", [running]) == [running]
    with pytest.raises(Fenced, match="has ended"):
        await bench.rollouts.deliver(running, b"3")
    assert await bench.redis.xlen(bench.keys.rollouts) == 0


async def test_close_of_many_tickets_takes_several_calls(bench):
    epoch = await bench.issued(1201)
    await bench.tickets.claim("actor-0", 100, 0)
    assert await bench.tickets.close(epoch, "job_finished") == {"queued": 1101, "running": 100}
    assert await bench.states() == {"job_finished": 1201}


async def test_a_ticket_closed_while_a_claim_is_on_its_way_is_not_started(bench):
    epoch = await bench.issued(1)
    # The first half of a claim, as of an actor whose start call comes late or never.
    await bench.redis.xreadgroup("actors", "actor-0", {bench.keys.tickets: ">"}, count=1)
    assert await bench.tickets.close(epoch, "cancelled") == {"queued": 1}
    assert await bench.tickets.take_over("actor-1", 1, 0) == []
    assert await bench.states() == {"cancelled": 1}


async def test_a_claim_that_was_never_started_is_taken_over_as_the_first_attempt(bench):
    await bench.issued(1)
    await bench.redis.xreadgroup("actors", "actor-0", {bench.keys.tickets: ">"}, count=1)
    assert await bench.states() == {"queued": 1}
    (claim,) = await bench.tickets.take_over("actor-1", 1, 0)
    assert claim.attempt == 1


async def test_a_start_whose_reply_was_lost_is_not_a_second_attempt(bench):
    await bench.issued(1)
    found = await bench.redis.xreadgroup("actors", "actor-0", {bench.keys.tickets: ">"}, count=1)
    ((entry, _),) = found[bench.keys.tickets.encode()]
    for _ in range(2):
        assert await broker.call(bench.redis, bench.keys, "start", "actor-0", "nonce", 5, entry, "0.0") == [1]


async def test_an_entry_that_a_ticket_has_left_starts_nothing(bench):
    """An actor is slow between taking an entry over and starting on it; meanwhile its holder gives the ticket back."""
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.redis.xautoclaim(bench.keys.tickets, "actors", "actor-1", 0, "0-0", count=1)
    await bench.tickets.give_back(claim, "drain")
    assert await broker.call(bench.redis, bench.keys, "start", "actor-1", "n", 5, claim.entry_id, "0.0") == [0]
    assert await bench.states() == {"queued": 1}
    assert len(await bench.tickets.claim("actor-2", 8, 0)) == 1


async def test_an_entry_of_no_ticket_is_dropped(bench):
    await bench.issued(1)
    await bench.redis.xadd(bench.keys.tickets, {"what": "ever"})
    assert len(await bench.tickets.claim("actor-0", 8, 0)) == 1
    assert await bench.states() == {"running": 1}


async def test_a_ticket_that_cannot_be_read_ends_as_malformed(bench):
    epoch = await bench.issued(0)
    await broker.call(bench.redis, bench.keys, "issue", epoch, "7.0", b"\xff\xff not a ticket")
    await bench.tickets.issue(epoch, bench.some(1))
    claims = await bench.tickets.claim("actor-0", 8, 0)
    assert [claim.ticket.ref.key for claim in claims] == ["0.0"]
    assert await bench.states() == {"running": 1, "malformed": 1}
    assert (await bench.rollouts.read(8, 0))[0].final_reason == "malformed"


async def test_two_sites_can_share_a_broker(bench, make_bench):
    epoch = await bench.issued(1)
    away = TicketQueue(bench.redis, bench.job, "away")
    assert await away.claim("actor-9", 8, 0) == []
    assert await away.issue(epoch, [bench.ticket(0, 0), bench.ticket(9, 0)]) == 2
    assert sorted(claim.ticket.ref.key for claim in await away.claim("actor-9", 8, 0)) == ["0.0", "9.0"]
    assert await away.close(epoch, "cancelled") == {"running": 2}
    assert await bench.states() == {"queued": 1}
    assert (await Ledger(bench.redis, bench.job, "away").counts()).by_site == {"away": {"cancelled": 2}}


async def test_nobody_gets_tickets_while_too_many_bytes_wait(bench, make_bench):
    epoch = await bench.issued(3)
    actor = TicketQueue(bench.redis, bench.job, max_queue_bytes=1000)
    (claim,) = await actor.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, os.urandom(2000))
    (delivery,) = await bench.rollouts.read(8, 0)
    await asyncio.sleep(0.3)  # it looks four times a second
    assert await actor.claim("actor-0", 1, 0) == []
    assert await bench.tickets.claim("actor-0", 1, 0) != []
    await bench.rollouts.acknowledge(epoch, [End(delivery.entry_id, delivery.ticket_key, "trained")])
    assert len(await actor.claim("actor-0", 1, 0)) == 1
    assert (await bench.ledger.counts()).bytes_waiting == 0
