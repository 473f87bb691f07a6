"""Rollouts that several attempts play, with journals on a real broker, real environments and a scripted generator."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from guessing import Forgetful, Replayed, Restored
from tiny_tokenizer import END, assets

from longshore.actor import journaling
from longshore.actor.beginning import Beginner, keeps_journal
from longshore.actor.episode import Reply, Transcript, play
from longshore.actor.surroundings import EnvironmentFactory
from longshore.errors import Fenced, Rejected, Unavailable
from longshore.rollout_queue.broker import BrokerFull
from longshore.rollout_queue.journal import Journal
from longshore.rollout_queue.tickets import Claim
from longshore.tasks.environment import MAX_SNAPSHOT_BYTES, Observation
from longshore.tasks.rendering import Renderer
from longshore.types import EngineFingerprint, FinishReason, KvMark, Message, SampledSpan, Sampling, Task

RENDERER = Renderer(assets())
SAMPLING = Sampling(1.0, 8, (END,))
ENGINE = EngineFingerprint("scripted", "1", "float32", "x")
# The target is 7: four turns, none of them right before the last.
GUESSES = ["1", "9", "2", "7"]


class Died(Exception):
    """The actor is no more."""


class Store:
    """The broker's journal, which can fail."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.failures: list[Exception | None] = []
        self.sizes: list[int] = []

    async def append(self, claim: Claim, index: int, turn: bytes) -> None:
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.sizes.append(len(turn))
        await self._journal.append(claim, index, turn)

    async def read(self, claim: Claim) -> list[bytes]:
        return await self._journal.read(claim)

    async def clear(self, claim: Claim) -> None:
        await self._journal.clear(claim)


@dataclass
class World:
    """One ticket, and actors that take it from one another."""

    bench: Any
    store: Store
    claim: Claim
    kind: type[Any] = Replayed
    digest: str = "renderer-1"
    max_turns: int = 9
    guesses: list[str] = field(default_factory=lambda: list(GUESSES))
    asked: list[int] = field(default_factory=list)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    starts: list[str] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    started_at: float = 0.0

    def began(self, start: str) -> None:
        self.starts.append(start)

    def journal_used(self, fate: str, turns: int, tokens: int) -> None:
        self.used.update({f"{fate} turns": turns, f"{fate} tokens": tokens})

    def not_journaled(self, reason: str) -> None:
        self.failed.append(reason)

    async def play(self, dies_in: int | None = None, sampling: Sampling = SAMPLING) -> Transcript:
        """One attempt; `dies_in`: the turn in which its actor dies."""

        async def generate(token_ids: list[int], sampling: Sampling, turn: int) -> Reply:
            self.asked.append(turn)
            # What is asked for a turn does not depend on who asks.
            assert self.prompts.setdefault(turn, list(token_ids)) == list(token_ids)
            if turn == dies_in:
                raise Died
            ids = RENDERER.reply_ids(self.guesses[turn])
            # The weights changed between the digit and the end; log-probs travel as float32.
            carried = SampledSpan(turn + 1, (-0.25,), kv=KvMark.CARRIED, kv_min_version=turn)
            return Reply(ids, [SampledSpan(turn, (-0.125 * (turn + 1),)), carried], FinishReason.STOP, (ENGINE,))

        beginner = Beginner(
            self.store, RENDERER, self.digest, self.max_turns, EnvironmentFactory(self.kind, {}, 5.0), 5.0, self
        )
        begun = await beginner.begin(self.claim, sampling)
        self.started_at = begun.started_at
        task = self.claim.ticket.task
        return await play(
            task, SAMPLING, self.max_turns, RENDERER, begun.surroundings, generate, begun.keeper, begun.behind
        )

    async def die_in(self, turn: int) -> None:
        with pytest.raises(Died):
            await self.play(turn)
        await self.next_actor()

    async def next_actor(self) -> None:
        (self.claim,) = await self.bench.tickets.take_over("actor-next", 1, 0)


@pytest.fixture
async def world(bench: Any) -> World:
    await bench.tickets.setup()
    epoch = await bench.tickets.open_epoch()
    task = Task("t", (Message("user", "?"),), answer="7")
    ticket = bench.ticket()
    await bench.tickets.issue(epoch, [type(ticket)(**{**vars(ticket), "task": task})])
    (claim,) = await bench.tickets.claim("actor-0", 1, 0)
    return World(bench, Store(Journal(bench.redis, bench.job)), claim)


async def whole(world: World) -> Transcript:
    """What an attempt that nothing interrupts makes."""
    undisturbed = World(world.bench, Store(Journal(world.bench.redis, world.bench.job)), world.claim, world.kind)
    undisturbed.store.failures = [Unavailable("it keeps nothing")] * len(GUESSES)
    return await undisturbed.play()


@pytest.mark.parametrize("kind", [Replayed, Restored])
async def test_goes_on_at_the_last_turn(world: World, kind: type) -> None:
    world.kind = kind
    expected = await whole(world)
    await world.die_in(2)
    began_at = world.started_at
    await world.die_in(3)
    made = await world.play()
    assert world.asked == [0, 1, 2, 2, 3, 3]
    assert made == expected
    assert made.turns[-1].info == {"guess": 7, "round": 4}
    assert world.starts == ["fresh", "resumed", "resumed"]
    assert world.used == {"saved turns": 5, "saved tokens": 10, "lost turns": 0, "lost tokens": 0}
    assert world.started_at == pytest.approx(began_at, abs=1e-5)


@pytest.mark.parametrize("kind", [Forgetful, Replayed, Restored])
async def test_a_finished_episode_only_has_to_be_scored(world: World, kind: type) -> None:
    world.kind = kind
    expected = await world.play()
    await world.next_actor()
    assert await world.play() == expected
    assert world.asked == [0, 1, 2, 3]
    # Also when its turns ran out.
    world.max_turns = 4
    world.guesses[3] = "8"
    await world.store.clear(world.claim)
    await world.next_actor()
    cut_off = await world.play()
    await world.next_actor()
    assert await world.play() == cut_off
    assert cut_off.finish is FinishReason.TURNS
    assert world.asked == [0, 1, 2, 3] * 2


async def test_what_cannot_be_brought_back_starts_anew(world: World) -> None:
    world.kind = Forgetful
    await world.die_in(2)
    await world.die_in(0)
    await world.play()
    assert world.asked == [0, 1, 2, 0, 0, 1, 2, 3]
    # The second attempt left nothing behind, and the first one's journal counts once.
    assert world.starts == ["fresh", "restarted", "fresh"]
    assert world.used == {"saved turns": 0, "saved tokens": 0, "lost turns": 2, "lost tokens": 4}


class OpensOtherwise(Replayed):
    def start(self, task: Task) -> list[Message]:
        return [*super().start(task), Message("user", "!")]


class AnswersOtherwise(Replayed):
    def step(self, reply: str) -> Observation:
        answer = super().step(reply)
        return Observation(answer.messages, answer.done, {**answer.info, "round": 0})


class Raises(Replayed):
    def step(self, reply: str) -> Observation:
        raise RuntimeError("boom")


class RefusesItsState(Restored):
    def restore(self, task: Task, snapshot: bytes) -> None:
        raise ValueError("an older format")


@pytest.mark.parametrize("kind", [OpensOtherwise, AnswersOtherwise, Raises, RefusesItsState])
async def test_an_environment_that_changed_starts_anew(world: World, kind: type) -> None:
    world.kind = Restored if issubclass(kind, Restored) else Replayed
    await world.die_in(2)
    world.kind = kind
    world.prompts.clear()
    with pytest.raises(Died):
        await world.play(0)
    assert world.starts == ["fresh", "restarted"]
    assert world.used["lost turns"] == 2


@pytest.mark.parametrize("change", ["renderer", "sampling", "bytes", "schema", "turns"])
async def test_a_journal_of_no_use_starts_anew(world: World, change: str, bench: Any) -> None:
    await world.die_in(2)
    sampling, name = SAMPLING, f"{bench.keys.ticket_prefix}{world.claim.ticket.ref.key}:journal"
    if change == "renderer":
        world.digest = "renderer-2"
    elif change == "sampling":
        sampling = Sampling(0.5, 8, (END,))
    elif change == "bytes":
        await bench.redis.lset(name, 1, b"not a journal")
    elif change == "schema":
        await world.store._journal.append(world.claim, 0, b"\x0a\x02\x08\x63")
    else:
        world.max_turns = 1
    with pytest.raises(Died):
        await world.play(0, sampling)
    assert world.starts == ["fresh", "restarted"]
    assert world.asked[-1] == 0
    assert await world.store.read(world.claim) == []


async def test_a_turn_that_the_broker_cannot_take_goes_along_with_the_next(world: World) -> None:
    world.store.failures = [None, BrokerFull("full"), None]
    await world.die_in(3)
    assert world.failed == ["unavailable"]
    await world.play()
    assert world.asked == [0, 1, 2, 3, 3]
    # The newest turns are what a broker that stays full costs.
    assert world.used["saved turns"] == 3


async def test_a_broker_that_lost_its_tail_gets_the_whole_journal_again(world: World, bench: Any) -> None:
    name = f"{bench.keys.ticket_prefix}{world.claim.ticket.ref.key}:journal"
    append = world.store.append

    async def forgetful_append(claim: Claim, index: int, turn: bytes) -> None:
        if index == 2:
            await bench.redis.ltrim(name, 0, 0)
        await append(claim, index, turn)

    world.store.append = forgetful_append  # type: ignore[method-assign]
    await world.die_in(3)
    await world.play()
    assert world.asked == [0, 1, 2, 3, 3]
    assert world.failed == []


async def test_an_attempt_that_is_no_longer_ours_ends(world: World) -> None:
    stale = world.claim
    await world.next_actor()
    world.claim = stale
    with pytest.raises(Fenced):
        await world.play()
    assert world.asked == [0]


async def test_a_journal_that_grows_too_large_is_given_up(world: World) -> None:
    world.store.failures = [None, Rejected("oversized", "17 MiB")]
    await world.play()
    assert world.failed == ["oversized"]
    assert len(world.store.sizes) == 1


class Saying(Restored):
    """Half a character, which nothing can encode."""

    def step(self, reply: str) -> Observation:
        answer = super().step(reply)
        return Observation([Message("user", "\ud800")] if answer.messages else [], answer.done, answer.info)


async def test_what_cannot_be_written_down_is_given_up(world: World) -> None:
    world.kind, world.guesses = Saying, ["1", "7"]
    # The model cannot be told either; but that is not the journal's to say.
    with pytest.raises(TypeError, match="TextInputSequence"):
        await world.play()
    assert world.failed == ["malformed"]


class Large(Restored):
    size = 600_000

    def snapshot(self) -> bytes:
        return super().snapshot().ljust(self.size)


async def test_snapshots_that_newer_ones_replace_do_not_pile_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journaling, "MAX_STALE_BYTES", 2_000_000)
    world.kind, world.max_turns = Large, 99
    world.guesses = [*(["1"] * 20), "7"]
    await world.die_in(20)
    kept = await world.store.read(world.claim)
    assert sum(map(len, kept)) < 2_000_000 + 3 * 600_000
    await world.play()
    assert world.asked == [*range(21), 20]


async def test_without_its_newest_snapshot_it_goes_on_at_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(Large):
        def snapshot(self) -> bytes:
            return super().snapshot() + b" " * (MAX_SNAPSHOT_BYTES if self._rounds == 3 else 0)

    world.kind, world.guesses = Growing, ["1", "2", "3", "4", "7"]
    await world.die_in(4)
    assert world.failed == ["snapshot"]
    await world.play()
    assert world.asked == [0, 1, 2, 3, 4, 2, 3, 4]
    assert world.used == {"saved turns": 2, "saved tokens": 4, "lost turns": 2, "lost tokens": 4}


def test_one_turn_is_kept_only_when_its_score_may_take_long() -> None:
    assert not keeps_journal(one_turn=True, score_timeout_s=10)
    assert keeps_journal(one_turn=True, score_timeout_s=600)
    assert keeps_journal(one_turn=False, score_timeout_s=10)
