"""Poison at the learner's intake: nothing malformed, oversized, forged or replayed gets in, and nothing stops."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from poison import KINDS, REASONS, body_of, deliverable, entry_of, honest
from poison_bench import Mixer, PoisonBench, peak_mebibytes
from redis.asyncio import Redis

from longshore.proto.v1 import task_pb2
from longshore.types import JobRef

BULK = 2000
DEADLINE_S = 20


@pytest.fixture
def make_poison_bench(redis: Redis) -> Callable[[], PoisonBench]:
    return lambda: PoisonBench(redis, JobRef("default", f"poison-{uuid.uuid4().hex[:8]}"))


async def test_each_kind_is_set_aside_for_its_own_reason_and_ends_no_ticket(make_poison_bench):
    bench = make_poison_bench()
    tickets = await bench.open(1)
    (claim, *_) = await bench.claim_all()
    for kind in KINDS:
        await bench.forge([kind.make(claim.ticket)])
        await bench.take_in()
        newest = (await bench.letters.list("", 1000))[-1]
        assert newest.reason == kind.reason, (kind.name, newest.reason, newest.detail)
        assert newest.kind == "rollout"
        assert len(newest.detail) <= 300
    letters = await bench.letters.list("", 1000)
    assert len(letters) == len(KINDS) >= 40
    known = [letter for letter in letters if letter.ticket_key == claim.ticket.ref.key]
    assert {task_pb2.Task.FromString(letter.task).task_id for letter in known} == {"task-0"}
    # The ticket that all of them named goes on as if nothing had been.
    assert bench.ledger.open[0].missing == [0, 1, 2, 3]
    await bench.deliver(claim, honest(claim.ticket))
    await bench.take_in()
    bench.check_books([claim], [])
    assert len(tickets) == 4


async def test_its_own_holder_can_only_spoil_its_own_ticket(make_poison_bench):
    bench = make_poison_bench()
    kinds = deliverable()
    await bench.open(len(kinds) // 4 + 1)
    claims = await bench.claim_all()
    spoiled, good = claims[: len(kinds)], claims[len(kinds) :]
    for claim, kind in zip(spoiled, kinds, strict=True):
        await bench.deliver(claim, body_of(kind, claim.ticket))
    for claim in good:
        await bench.deliver(claim, honest(claim.ticket))
    await bench.take_in()
    bench.check_books(good, spoiled)
    counts = await bench.link.counts()
    assert counts.balanced
    assert counts.issued == bench.ledger.issued
    assert (counts.states["rejected"], counts.states["delivered"]) == (len(spoiled), len(good))


async def test_replays_are_harmless_before_and_after_the_end(make_poison_bench):
    bench = make_poison_bench()
    await bench.open(1)
    claims = await bench.claim_all()
    copies = [entry_of(claim.ticket, honest(claim.ticket)) for claim in claims]
    for claim in claims:
        await bench.deliver(claim, honest(claim.ticket))
    await bench.forge(copies * 3)
    await bench.take_in()
    bench.check_books(claims, [])
    (group,) = bench.ledger.take_ready(1)
    endings = bench.ledger.settle(group, "trained")
    assert len(endings) == len(claims)
    await bench.forge(copies)
    await bench.take_in()
    assert bench.ledger.ends == {("home", "trained"): len(claims)}
    assert await bench.letters.count() == 0


@pytest.mark.timeout(DEADLINE_S)
async def test_thousands_of_all_kinds_among_good_ones(make_poison_bench):
    bench = make_poison_bench()
    await bench.open(25)
    claims = await bench.claim_all()
    mixer = Mixer(bench, KINDS, seed=1)
    before = peak_mebibytes()
    for start in range(0, len(claims), 10):
        await mixer.send(claims[start : start + 10], BULK // 10)
        await bench.take_in()
    assert mixer.sent.total() - mixer.sent["a replay"] >= BULK
    assert min(mixer.sent[kind.name] for kind in KINDS) >= 10
    bench.check_books(mixer.honest, mixer.poisoned)
    reasons = await bench.reasons()
    assert reasons.keys() == REASONS
    assert await bench.letters.count() <= 1100
    assert peak_mebibytes() - before < 400
    counts = await bench.link.counts()
    assert counts.balanced
    # Nothing is left on the stream but what the ledger holds, and repeats, which leave with it.
    repeats = mixer.sent["a replay"] + mixer.sent["a verdict before its rollout"]
    assert await bench.redis.xlen(bench.keys.rollouts) <= len(mixer.honest) + repeats


async def test_an_evaluation_is_answered_by_its_own_version_alone(make_poison_bench):
    from dataclasses import replace

    from poison import NEWEST_VERSION, honest_message

    from longshore.types import Message, Purpose, Sampling, Task, Ticket, TicketRef, VersionConstraint

    bench = make_poison_bench()
    await bench.link.open(at_least=1)
    task = Task("held-out", (Message("user", "x"),))
    group = bench.ledger.issue(task, Purpose.EVALUATION, 2, pin=NEWEST_VERSION)
    pin = VersionConstraint(NEWEST_VERSION, NEWEST_VERSION)
    first = Ticket(TicketRef(bench.job, 0, 0), 2, Purpose.EVALUATION, task, Sampling(1.0, 16), 1, 1.0, pin)
    await bench.link.issue([first, replace(first, ref=TicketRef(bench.job, 0, 1))])
    old, right = await bench.claim_all()
    message = honest_message(old.ticket)
    message.min_version = message.max_version = message.segments[0].spans[1].policy_version = NEWEST_VERSION - 1
    await bench.deliver(old, message.SerializeToString())
    await bench.deliver(right, honest(right.ticket))
    await bench.take_in()
    assert group.final_reasons == {0: "rejected"}
    assert list(group.rollouts) == [1]
    assert await bench.reasons() == {"versions": 1}
