"""Journal entries: what is written is read, and nothing that is read can do more harm than a fresh start."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.actor.episode import PlayedTurn, Reply
from longshore.actor.journal_codec import Terms, head_to_proto, read_journal, turn_to_proto
from longshore.errors import Rejected
from longshore.proto.v1 import journal_pb2
from longshore.tasks.environment import Observation
from longshore.types import EngineFingerprint, FinishReason, KvMark, Message, SampledSpan, Sampling

TERMS = Terms("digest", Sampling(0.7, 8, (1, 2)))
OPENING = [Message("system", "Be short."), Message("user", "3+4=")]
SPANS = [
    SampledSpan(3, (-0.5, -1.25)),
    SampledSpan(4, (-0.125,), kv=KvMark.CARRIED, kv_min_version=3),
    # Another generator went on.
    SampledSpan(4, (-2.0,), engine_index=1),
]
ENGINES = (EngineFingerprint("e", "1", "bfloat16", "tp2"), EngineFingerprint("e", "1", "float32", "cpu"))
REPLY = Reply([7, 8, 9, 2], SPANS, FinishReason.STOP, ENGINES)
TURNS = [
    PlayedTurn([5, 6], REPLY, Observation([Message("tool", "go on")], False, {"guess": 7, "far": [1.5, None]})),
    PlayedTurn([], REPLY, Observation([], True)),
]


def entry(*turns: PlayedTurn, head: bool, snapshot: bytes | None = None) -> journal_pb2.JournalEntry:
    return journal_pb2.JournalEntry(
        head=head_to_proto(TERMS, OPENING, 1_700_000_000.25) if head else None,
        turns=[turn_to_proto(turn) for turn in turns],
        snapshot=snapshot,
    )


WRITTEN = [
    entry(TURNS[0], head=True, snapshot=b"").SerializeToString(),
    entry(TURNS[1], head=False).SerializeToString(),
]


def test_what_is_written_is_read() -> None:
    found = read_journal(WRITTEN, TERMS)
    assert (found.opening, found.started_at) == (OPENING, 1_700_000_000.25)
    assert found.behind.turns == TURNS
    assert found.behind.num_sampled == 8
    # An empty snapshot is one.
    assert [item.snapshot for item in found.entries] == [b"", None]
    used = found.up_to_snapshot()
    assert used is not None
    assert used.behind.turns == TURNS[:1]
    assert read_journal(WRITTEN[:1], TERMS).up_to_snapshot() is not None


@pytest.mark.parametrize("part", ["finish", "engine", "logprobs", "tokens", "kv", "info", "turns"])
def test_a_turn_that_is_not_whole_is_refused(part: str) -> None:
    broken = entry(TURNS[0], head=True)
    (turn,) = broken.turns
    if part == "finish":
        turn.reply[-1].ClearField("finish")
    elif part == "engine":
        turn.reply[0].ClearField("engine")
    elif part == "logprobs":
        turn.reply[1].logprobs.append(-0.5)
    elif part == "tokens":
        turn.ClearField("reply")
    elif part == "kv":
        turn.reply[1].ClearField("kv")
    elif part == "info":
        turn.info_json = "[1"
    else:
        broken.ClearField("turns")
    with pytest.raises(Rejected):
        read_journal([broken.SerializeToString()], TERMS)


@pytest.mark.parametrize("other", [Terms("another", TERMS.sampling), Terms("digest", Sampling(0.7, 9, (1, 2)))])
def test_another_s_journal_is_refused(other: Terms) -> None:
    with pytest.raises(Rejected, match="terms"):
        read_journal(WRITTEN, other)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever the bytes, the outcome is a journal or a Rejected, never another error."""
    number = data.draw(st.integers(0, 1))
    damaged = bytearray(WRITTEN[number])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    entries = list(WRITTEN)
    entries[number] = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        found = read_journal(entries, TERMS)
    except Rejected:
        return
    assert all(turn.reply.is_sound for turn in found.behind.turns)
