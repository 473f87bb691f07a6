"""Rollouts on the real broker: delivered once, read in order, acknowledged, set aside."""

import asyncio
import os

import pytest

from longshore.errors import Fenced, Rejected
from longshore.rollout_queue import heads, payload, rollouts, stream_reader
from longshore.rollout_queue.rollouts import End, RolloutQueue


async def test_a_rollout_goes_home(bench):
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    assert await bench.rollouts.deliver(claim, b"tokens") is True
    assert await bench.states() == {"delivered": 1}
    (delivery,) = await bench.rollouts.read(8, 0)
    assert (delivery.ticket_key, delivery.attempt, delivery.payload) == ("0.0", 1, b"tokens")
    assert (delivery.final_reason, delivery.site) == (None, "home")
    assert await bench.rollouts.read(8, 0) == []


async def test_the_same_bytes_twice_are_harmless_and_other_bytes_are_fenced(bench):
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    assert await bench.rollouts.deliver(claim, b"tokens") is True
    assert await bench.rollouts.deliver(claim, b"tokens") is False
    with pytest.raises(Fenced, match="no longer held"):
        await bench.rollouts.deliver(claim, b"others")
    assert [item.payload for item in await bench.rollouts.read(8, 0)] == [b"tokens"]


async def test_of_two_attempts_only_the_holder_delivers(bench):
    await bench.issued(1)
    (old,) = await bench.tickets.claim("actor-0", 1, 0)
    (new,) = await bench.tickets.take_over("actor-1", 1, 0)
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(old, b"late")
    assert await bench.rollouts.deliver(new, b"new")
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(old, b"late")
    assert await bench.states() == {"delivered": 1}


async def test_a_late_rollout_is_taken_while_nobody_has_started_anew(bench):
    await bench.issued(2)
    first, second = await bench.tickets.claim("actor-0", 2, 0)
    await bench.tickets.give_back(first, "drain")
    await bench.tickets.give_back(second, "drain")
    assert await bench.rollouts.deliver(first, b"late")
    assert await bench.states() == {"queued": 1, "delivered": 1}
    (anew,) = await bench.tickets.claim("actor-1", 8, 0)
    assert anew.ticket.ref == second.ticket.ref
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(second, b"late")
    await bench.tickets.give_back(anew, "drain")
    with pytest.raises(Fenced):
        await bench.rollouts.deliver(second, b"late")
    assert await bench.states() == {"queued": 1, "delivered": 1}


@pytest.mark.parametrize("size", [0, 100, 100_000, 5_000_000])
@pytest.mark.parametrize("kind", ["random", "regular"])
async def test_payloads_of_every_size_arrive_whole(bench, size, kind):
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    sent = os.urandom(size) if kind == "random" else b"01234567" * (size // 8)
    await bench.rollouts.deliver(claim, sent)
    ((_, fields),) = await bench.redis.xrange(bench.keys.rollouts)
    packed = kind == "regular" and size > 1000
    assert heads.read(fields[b"rollout"]).codec == ("zstd" if packed else "plain")
    assert len(fields[b"payload"]) < max(1, size // 10) if packed else fields[b"payload"] == sent
    assert (await bench.rollouts.read(1, 0))[0].payload == sent


async def test_an_oversized_rollout_is_refused_before_it_is_sent(bench, monkeypatch):
    monkeypatch.setattr(payload, "MAX_BYTES", 1000)
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    with pytest.raises(Rejected, match="oversized"):
        await bench.rollouts.deliver(claim, bytes(1001))
    assert await bench.rollouts.deliver(claim, bytes(1000))


async def test_a_waiting_read_gets_a_rollout_as_soon_as_it_is_there(bench):
    await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    waiting = asyncio.create_task(bench.rollouts.read(8, 5_000))
    await asyncio.sleep(0.05)
    await bench.rollouts.deliver(claim, b"x")
    assert len(await asyncio.wait_for(waiting, 4)) == 1


async def deliver_all(bench, count):
    epoch = await bench.issued(count)
    for claim in await bench.tickets.claim("actor-0", count, 0):
        await bench.rollouts.deliver(claim, f"rollout {claim.ticket.ref.key}".encode())
    return epoch


async def test_a_restarted_learner_pages_through_what_it_had_not_acknowledged(bench):
    epoch = await deliver_all(bench, 8)
    before = await bench.rollouts.read(6, 0)
    await bench.end(epoch, {item.ticket_key: item.entry_id for item in before}, {"0.1": "trained"})
    after_restart = RolloutQueue(bench.redis, bench.job)
    pages = []
    after = "0"
    while page := await after_restart.read_pending(after, 2):
        pages.append([item.ticket_key for item in page])
        after = page[-1].entry_id
    assert pages == [["0.0", "0.2"], ["0.3", "1.0"], ["1.1"]]
    assert [item.ticket_key for item in await after_restart.read(8, 0)] == ["1.2", "1.3"]


async def test_entries_in_a_reply_that_got_lost_are_read_again(bench):
    await deliver_all(bench, 3)
    assert [item.ticket_key for item in await bench.rollouts.read(1, 0)] == ["0.0"]
    await bench.redis.xreadgroup("learner", "learner", {bench.keys.rollouts: ">"}, count=1)
    assert [item.ticket_key for item in await bench.rollouts.read(8, 0)] == ["0.1"]
    assert [item.ticket_key for item in await bench.rollouts.read(8, 0)] == ["0.2"]
    assert await bench.rollouts.read(8, 0) == []


async def test_what_a_superseded_learner_took_from_us_is_read_after_all(bench, monkeypatch):
    await bench.issued(3)
    first, second, third = await bench.tickets.claim("actor-0", 3, 0)
    old, new = (RolloutQueue(bench.redis, bench.job) for _ in range(2))
    assert await new.read(8, 0) == []
    await bench.rollouts.deliver(first, b"1")
    await bench.rollouts.deliver(second, b"2")
    # It slept, and wakes between our look at what is pending and our read of what is new.
    (took,) = await old.read(1, 0)
    monkeypatch.setattr(new._reader, "_newest", took.entry_id)
    assert [item.payload for item in await new.read(8, 0)] == [b"2"]
    assert await new.read(8, 0) == []
    monkeypatch.setattr(stream_reader, "LOOK_S", 0.0)
    assert [item.payload for item in await new.read(8, 0)] == [b"1"]
    await bench.rollouts.deliver(third, b"3")
    assert [item.payload for item in await new.read(8, 0)] == [b"3"]
    assert await new.read(8, 0) == []


async def test_acknowledging_ends_tickets_once(bench):
    epoch = await deliver_all(bench, 3)
    ends = [End(item.entry_id, item.ticket_key, "trained") for item in await bench.rollouts.read(8, 0)]
    ends[2] = End(ends[2].entry_id, ends[2].ticket_key, "zero_variance")
    for _ in range(2):
        await bench.rollouts.acknowledge(epoch, ends)
        assert await bench.states() == {"trained": 2, "zero_variance": 1}
    assert await bench.rollouts.read_pending() == []
    assert await bench.redis.xlen(bench.keys.rollouts) == 0
    assert (await bench.redis.xpending(bench.keys.rollouts, "learner"))["pending"] == 0


async def test_an_older_epoch_can_neither_acknowledge_nor_set_aside(bench):
    old = await deliver_all(bench, 1)
    (delivery,) = await bench.rollouts.read(8, 0)
    await bench.tickets.open_epoch()
    with pytest.raises(Fenced):
        await bench.rollouts.acknowledge(old, [End(delivery.entry_id, delivery.ticket_key, "trained")])
    with pytest.raises(Fenced):
        await bench.rollouts.dead_letter(old, delivery, "schema", "")
    assert await bench.states() == {"delivered": 1}


async def test_a_final_notice_is_acknowledged_without_counting_twice(bench):
    epoch = await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.tickets.reject(claim, "prompt_too_long", "")
    (notice,) = await bench.rollouts.read(8, 0)
    await bench.rollouts.acknowledge(epoch, [End(notice.entry_id, notice.ticket_key, "prompt_too_long")])
    assert await bench.states() == {"prompt_too_long": 1}
    assert await bench.redis.xlen(bench.keys.rollouts) == 0


async def test_the_learner_ends_tickets_that_the_broker_thinks_are_still_out(bench):
    epoch = await bench.issued(3)
    (running,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.acknowledge(epoch, [End("1-1", "0.0", "trained"), End(None, "0.1", "cancelled")])
    assert await bench.states() == {"queued": 1, "trained": 1, "cancelled": 1}
    with pytest.raises(Fenced, match="has ended"):
        await bench.rollouts.deliver(running, b"x")
    assert [claim.ticket.ref.key for claim in await bench.tickets.claim("actor-0", 8, 0)] == ["0.2"]


async def test_ending_a_delivered_ticket_by_its_key_forgets_its_entry(bench):
    epoch = await deliver_all(bench, 1)
    await bench.rollouts.acknowledge(epoch, [End(None, "0.0", "cancelled")])
    assert await bench.redis.xlen(bench.keys.rollouts) == 0
    assert await bench.states() == {"cancelled": 1}


async def test_a_rollout_that_fails_validation_is_set_aside(bench):
    epoch = await deliver_all(bench, 1)
    (delivery,) = await bench.rollouts.read(8, 0)
    for _ in range(2):
        await bench.rollouts.dead_letter(epoch, delivery, "span_lengths", "9 tokens, spans cover 8")
    assert await bench.states() == {"rejected": 1}
    ((_, letter),) = await bench.redis.xrange(bench.keys.dead)
    assert (letter[b"kind"], letter[b"key"], letter[b"reason"]) == (b"rollout", b"0.0", b"span_lengths")
    assert (letter[b"payload"], letter[b"detail"]) == (b"rollout 0.0", b"9 tokens, spans cover 8")
    assert await bench.redis.xlen(bench.keys.rollouts) == 0


async def test_dead_letters_do_not_fill_the_broker(bench):
    epoch = await bench.issued(1300)
    claims = await bench.tickets.claim("actor-0", 1300, 0)
    await bench.rollouts.deliver(claims[0], os.urandom(300_000))
    (delivery,) = await bench.rollouts.read(1, 0)
    await bench.rollouts.dead_letter(epoch, delivery, "schema", "")
    ((_, letter),) = await bench.redis.xrange(bench.keys.dead)
    assert letter[b"payload_bytes"] == b"300000"
    assert b"payload" not in letter
    await asyncio.gather(*(bench.tickets.reject(claim, "too_long", "") for claim in claims[1:]))
    assert 1000 <= await bench.redis.xlen(bench.keys.dead) < 1200


@pytest.mark.parametrize(
    "change", [{"codec": "lzma"}, {"payload": b"other"}, {"digest": "00"}, {"schema": "2"}, {"codec": "zstd"}]
)
async def test_a_payload_that_did_not_survive_its_way_is_handed_on_empty(bench, change):
    epoch = await deliver_all(bench, 1)
    ((entry, fields),) = await bench.redis.xrange(bench.keys.rollouts)
    await bench.redis.xdel(bench.keys.rollouts, entry)
    data = change.get("payload", fields[b"payload"])
    head = heads.read(fields[b"rollout"])._asdict() | change
    words = [head[name] for name in ("schema", "key", "attempt", "site", "awaiting", "codec", "digest")]
    changed = await bench.redis.xadd(bench.keys.rollouts, {"rollout": " ".join(words), "payload": data})
    line = await bench.redis.hget(bench.keys.live, "0.0")
    await bench.redis.hset(bench.keys.live, "0.0", line.replace(entry, changed))
    (delivery,) = await bench.rollouts.read(8, 0)
    assert (delivery.ticket_key, delivery.payload, delivery.final_reason) == ("0.0", b"", None)
    await bench.rollouts.dead_letter(epoch, delivery, "malformed", "")
    assert await bench.states() == {"rejected": 1}


async def test_an_entry_that_nobody_delivered_is_set_aside_and_its_ticket_goes_on(bench):
    epoch = await bench.issued(1)
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    forged = {"rollout": "1 0.0 1 home 0 plain 00", "payload": b"forged"}
    await bench.redis.xadd(bench.keys.rollouts, forged)
    (delivery,) = await bench.rollouts.read(8, 0)
    assert await bench.rollouts.dead_letter(epoch, delivery, "malformed", "") is False
    assert await bench.states() == {"running": 1}
    assert await bench.rollouts.deliver(claim, b"genuine")


async def test_an_entry_of_nobody_is_dropped(bench):
    await deliver_all(bench, 1)
    await bench.redis.xadd(bench.keys.rollouts, {"what": "ever"})
    assert [item.ticket_key for item in await bench.rollouts.read(8, 0)] == ["0.0"]
    assert await bench.redis.xlen(bench.keys.rollouts) == 1


async def test_entries_of_nobody_do_not_end_the_paging(bench):
    epoch = await bench.issued(0)
    for _ in range(3):
        await bench.redis.xadd(bench.keys.rollouts, {"what": "ever"})
    await bench.tickets.issue(epoch, bench.some(1))
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    await bench.rollouts.deliver(claim, b"x")
    await bench.redis.xreadgroup("learner", "learner", {bench.keys.rollouts: ">"})
    assert [item.ticket_key for item in await bench.rollouts.read_pending(count=1)] == ["0.0"]


async def test_a_read_aims_at_a_size_in_bytes(bench, monkeypatch):
    monkeypatch.setattr(rollouts, "_READ_BYTES", 100_000)
    await bench.issued(40)
    for claim in await bench.tickets.claim("actor-0", 40, 0):
        await bench.rollouts.deliver(claim, os.urandom(40_000))
    sizes = []
    while found := await bench.rollouts.read(40, 0):
        sizes.append(len(found))
    assert sum(sizes) == 40
    assert max(sizes[4:]) <= 3
