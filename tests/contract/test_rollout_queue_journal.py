"""Journals, blobs and dead letters on the real broker."""

import os
from pathlib import Path

import pytest

from longshore.errors import ConfigError, Conflict, Fenced, IntegrityError, NotFound, Rejected, Unavailable
from longshore.proto.v1 import task_pb2
from longshore.rollout_queue import journal as journal_module
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.channel import JobChannel
from longshore.rollout_queue.dead_letters import DeadLetters
from longshore.rollout_queue.journal import Journal
from longshore.rollout_queue.rollouts import End, RolloutQueue


@pytest.fixture
def journal(bench):
    return Journal(bench.redis, bench.job)


async def claimed(bench, count=1):
    await bench.issued(count)
    return await bench.tickets.claim("actor-0", count, 0)


async def test_the_next_attempt_finds_the_turns_of_the_one_before(bench, journal):
    (claim,) = await claimed(bench)
    for index, turn in enumerate((b"one", b"two", b"two", os.urandom(100_000))):
        await journal.append(claim, min(index, 2) if index < 3 else 3, turn)
    (taker,) = await bench.tickets.take_over("actor-1", 1, 0)
    assert [len(turn) for turn in await journal.read(taker)] == [3, 3, 3, 100_000]
    with pytest.raises(Fenced):
        await journal.append(claim, 4, b"late")
    # It goes on from the second turn: what came after is replaced.
    await journal.append(taker, 1, b"other")
    assert await journal.read(taker) == [b"one", b"other"]


async def test_a_gap_is_refused(bench, journal):
    (claim,) = await claimed(bench)
    with pytest.raises(Rejected, match="gap"):
        await journal.append(claim, 1, b"second without a first")


@pytest.mark.parametrize(("reason", "kept"), [("drain", 1), ("unavailable", 1), ("verifier_failed", 0)])
async def test_a_drained_attempt_leaves_its_journal_and_one_at_fault_does_not(bench, journal, reason, kept):
    (claim,) = await claimed(bench)
    await journal.append(claim, 0, b"one")
    await bench.tickets.give_back(claim, reason)
    (again,) = await bench.tickets.claim("actor-1", 1, 0)
    assert len(await journal.read(again)) == kept


async def test_a_journal_ends_with_its_ticket(bench, journal):
    claims = await claimed(bench, 3)
    for claim in claims:
        await journal.append(claim, 0, b"one")
    await bench.rollouts.deliver(claims[0], b"x")
    await bench.tickets.reject(claims[1], "too_long", "")
    await bench.tickets.close(await bench.tickets.open_epoch(), "cancelled")
    assert [await journal.read(claim) for claim in claims] == [[], [], []]
    assert [name async for name in bench.redis.scan_iter(match=f"{bench.keys.ticket_prefix}*")] == []


async def test_a_journal_is_bounded(bench, journal, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_JOURNAL_BYTES", 1000)
    (claim,) = await claimed(bench)
    await journal.append(claim, 0, os.urandom(600))
    with pytest.raises(Rejected, match="oversized"):
        await journal.append(claim, 1, os.urandom(600))
    assert await journal.read(claim) == []


async def test_a_damaged_journal_is_told(bench, journal):
    (claim,) = await claimed(bench)
    await journal.append(claim, 0, b"one")
    await bench.redis.rpush(f"{bench.keys.ticket_prefix}0.0:journal", b"\x28\xb5\x2f\xfd\xff\xff rubbish")
    with pytest.raises(IntegrityError):
        await journal.read(claim)
    await journal.clear(claim)
    assert await journal.read(claim) == []


async def test_who_slept_clears_nothing(bench, journal):
    (old,) = await claimed(bench)
    await journal.append(old, 0, b"one")
    (new,) = await bench.tickets.take_over("actor-1", 1, 0)
    await journal.append(new, 1, b"two")
    with pytest.raises(Fenced):
        await journal.clear(old)
    assert await journal.read(new) == [b"one", b"two"]
    await journal.clear(new)
    assert await journal.read(new) == []


# -- blobs -------------------------------------------------------------------------------------------------------------


async def test_a_large_rollout_goes_by_reference(bench, tmp_path):
    blobs = Blobs.open(f"file://{tmp_path}/blobs")
    actor, learner = (RolloutQueue(bench.redis, bench.job, blobs=blobs) for _ in range(2))
    small, large = await claimed(bench, 2)
    contents = os.urandom(1_000_000)
    assert await actor.deliver(small, b"small")
    assert await actor.deliver(large, contents) is True
    assert await actor.deliver(large, contents) is False
    assert (await bench.ledger.counts()).bytes_waiting < 500
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    deliveries = await learner.read(8, 0)
    assert [item.payload for item in deliveries] == [b"small", contents]
    epoch = await bench.tickets.open_epoch()
    await learner.acknowledge(epoch, [End(item.entry_id, item.ticket_key, "trained") for item in deliveries])
    assert not files[0].exists()


@pytest.mark.parametrize("damage", ["changed", "gone", "elsewhere"])
async def test_a_damaged_blob_reaches_nobody(bench, tmp_path, damage):
    blobs = Blobs.open(f"file://{tmp_path}/blobs")
    queue = RolloutQueue(bench.redis, bench.job, blobs=blobs)
    (claim,) = await claimed(bench)
    await queue.deliver(claim, os.urandom(1_000_000))
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "gone":
        file.unlink()
    else:
        ((entry, fields),) = await bench.redis.xrange(bench.keys.rollouts)
        await bench.redis.xdel(bench.keys.rollouts, entry)
        await bench.redis.xadd(bench.keys.rollouts, fields | {b"payload": b"../../etc/passwd"})
    assert [item.payload for item in await queue.read(8, 0)] == [b""]


class AwayBlobs(Blobs):
    """A storage that can be away."""

    def __init__(self, folder: Path) -> None:
        self.real = Blobs.open(f"file://{folder}/blobs")
        self.away = False

    async def put(self, path: str, data: bytes) -> None:
        self.check()
        await self.real.put(path, data)

    async def get(self, path: str, max_bytes: int) -> bytes:
        self.check()
        return await self.real.get(path, max_bytes)

    def check(self) -> None:
        if self.away:
            raise Unavailable("the storage is away")


async def test_a_large_rollout_that_is_not_taken_leaves_nothing_behind(bench, tmp_path):
    queue = RolloutQueue(bench.redis, bench.job, blobs=Blobs.open(f"file://{tmp_path}/blobs"))
    (old,) = await claimed(bench)
    (new,) = await bench.tickets.take_over("actor-1", 1, 0)
    contents = os.urandom(1_000_000)
    with pytest.raises(Fenced):
        await queue.deliver(old, contents)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert await queue.deliver(new, contents)
    with pytest.raises(Fenced):
        await queue.deliver(new, contents[::-1])
    assert await queue.deliver(new, contents) is False
    assert [item.payload for item in await queue.read(8, 0)] == [contents]


async def test_what_could_not_be_fetched_is_read_again(bench, tmp_path):
    blobs = AwayBlobs(tmp_path)
    queue = RolloutQueue(bench.redis, bench.job, blobs=blobs)
    first, second, third = await claimed(bench, 3)
    contents = os.urandom(1_000_000)
    for claim, payload in ((first, b"small"), (second, contents), (third, b"small")):
        assert await queue.deliver(claim, payload)
    blobs.away = True
    for read in (queue.read(8, 0), queue.read_pending()):
        with pytest.raises(Unavailable):
            await read
    blobs.away = False
    assert [item.payload for item in await queue.read(8, 0)] == [b"small", contents, b"small"]
    assert await queue.read(8, 0) == []


async def test_small_rollouts_go_home_while_the_storage_is_away(bench, tmp_path):
    blobs = AwayBlobs(tmp_path)
    queue = RolloutQueue(bench.redis, bench.job, blobs=blobs)
    small, large, other = await claimed(bench, 3)
    contents = os.urandom(1_000_000)
    rollouts = [(small, b"small", False), (large, contents, False), (other, b"small", False)]
    blobs.away = True
    first, held, last = await queue.deliver_many(rollouts)
    assert (first, last) == (True, True)
    assert isinstance(held, Unavailable)
    with pytest.raises(Unavailable):
        await queue.deliver(large, contents)
    blobs.away = False
    assert await queue.deliver_many(rollouts) == [False, True, False]


async def test_blobs_need_a_url_that_can_be_used(tmp_path):
    with pytest.raises(ConfigError, match="blobs URL"):
        Blobs.open("nonsense://x")
    blobs = Blobs.open(f"file://{tmp_path}")
    with pytest.raises(NotFound):
        await blobs.get("a/b", 10)
    await blobs.put("a/b", bytes(11))
    with pytest.raises(Rejected, match="oversized"):
        await blobs.get("a/b", 10)
    await blobs.delete(["a/b", "a/none"])


# -- dead letters ------------------------------------------------------------------------------------------------------


async def test_dead_letters_are_listed_shown_and_requeued(bench):
    first, second, third = await claimed(bench, 3)
    epoch = await bench.tickets.open_epoch()
    await bench.tickets.reject(first, "too_long", "10,000 tokens")
    await bench.rollouts.deliver(second, b"bad")
    await bench.rollouts.deliver(third, b"worse")
    found = {item.ticket_key: item for item in await bench.rollouts.read(8, 0)}
    task = task_pb2.Task(task_id="task-0").SerializeToString()
    assert await bench.rollouts.dead_letter(epoch, found["0.1"], "malformed", "not a rollout", task)
    assert await bench.rollouts.dead_letter(epoch, found["0.2"], "malformed", "not a rollout")

    letters = DeadLetters(bench.redis, bench.job)
    ticket, rollout, unknown = await letters.list()
    assert (ticket.kind, ticket.ticket_key, ticket.reason, ticket.detail) == (
        "ticket",
        "0.0",
        "too_long",
        "10,000 tokens",
    )
    assert (rollout.kind, rollout.payload, rollout.site, rollout.attempt) == ("rollout", b"bad", "home", 1)
    assert [item.letter_id for item in await letters.list(after=ticket.letter_id, count=1)] == [rollout.letter_id]
    assert await letters.get(rollout.letter_id) == rollout
    assert await letters.count() == 3

    channel = JobChannel(bench.redis, bench.job)
    await letters.requeue(ticket.letter_id)
    await letters.requeue(rollout.letter_id)
    wishes = await channel.requeues()
    assert [task_pb2.Task.FromString(wish).task_id for _, wish in wishes] == ["task-0", "task-0"]
    await channel.drop_requeues([wishes[0][0]])
    assert await channel.requeues() == wishes[1:]
    with pytest.raises(Conflict, match="does not say which task"):
        await letters.requeue(unknown.letter_id)
    for wrong in ("9-9", "what", "1-0 COUNT"):
        with pytest.raises(NotFound):
            await letters.get(wrong)
