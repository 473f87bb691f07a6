"""Finished turns to journal entries and back. Knows neither the broker nor what an environment is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import google.protobuf.message

from longshore.actor.episode import Behind, PlayedTurn
from longshore.actor.replies import reply_from_events, reply_to_events
from longshore.errors import Rejected
from longshore.proto.v1 import journal_pb2, task_pb2
from longshore.rpc import convert
from longshore.tasks.environment import Observation
from longshore.types import Message, Sampling

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Terms:
    """What a journal was made under; its turns are of use only under the same.

    Example: Terms(renderer="sha256 of the tokenizer's files", sampling=Sampling(1.0, 64, (2,)))
    """

    renderer: str
    sampling: Sampling


@dataclass(frozen=True)
class JournaledTurns:
    """One entry: turns, and the environment's state after the last of them, if it was kept."""

    turns: list[PlayedTurn]
    snapshot: bytes | None


@dataclass(frozen=True)
class Journaled:
    """A journal as it was read, with at least one turn."""

    opening: list[Message]
    # Unix seconds.
    started_at: float
    entries: list[JournaledTurns]

    @property
    def behind(self) -> Behind:
        """All of it."""
        return Behind(self.opening, [turn for entry in self.entries for turn in entry.turns])

    def up_to_snapshot(self) -> Journaled | None:
        """Without the entries after the newest snapshot; None without any snapshot."""
        for used in range(len(self.entries), 0, -1):
            if self.entries[used - 1].snapshot is not None:
                return replace(self, entries=self.entries[:used])
        return None


def head_to_proto(terms: Terms, opening: Sequence[Message], started_at: float) -> journal_pb2.JournalHead:
    """Raises ValueError or TypeError for messages that cannot travel."""
    return journal_pb2.JournalHead(
        schema_version=SCHEMA_VERSION,
        renderer=terms.renderer,
        sampling=convert.sampling_to_proto(terms.sampling),
        opening=[convert.message_to_proto(message) for message in opening],
        started_at=convert.timestamp(started_at),
    )


def turn_to_proto(turn: PlayedTurn) -> journal_pb2.JournalTurn:
    """Raises ValueError or TypeError for an answer that cannot travel."""
    answer = turn.observation
    return journal_pb2.JournalTurn(
        given_token_ids=turn.given,
        reply=reply_to_events(turn.reply),
        messages=[convert.message_to_proto(message) for message in answer.messages],
        done=answer.done,
        info_json=json.dumps(answer.info) if answer.info else "",
    )


def turn_from_proto(message: journal_pb2.JournalTurn) -> PlayedTurn:
    """Raises Rejected when it is not a whole turn."""
    answer = Observation(_messages(message.messages), message.done, convert.json_object(message.info_json, "info_json"))
    return PlayedTurn(list(message.given_token_ids), reply_from_events(message.reply), answer)


def read_journal(found: Sequence[bytes], terms: Terms) -> Journaled:
    """What the entries of a journal, at least one, say.

    Raises:
        Rejected: reasons `malformed`, `schema`, or `terms`: it was made under others.
    """
    entries = [_parse(data) for data in found]
    head = entries[0].head
    if head.schema_version != SCHEMA_VERSION:
        raise Rejected("schema", f"journal schema {head.schema_version} is not {SCHEMA_VERSION}")
    if Terms(head.renderer, convert.sampling_from_proto(head.sampling)) != terms:
        raise Rejected("terms", "the journal was made with another tokenizer or other sampling parameters")
    if not all(entry.turns for entry in entries):
        raise Rejected("malformed", "a journal entry without turns")
    return Journaled(
        _messages(head.opening),
        convert.seconds(head.started_at),
        [
            JournaledTurns(
                [turn_from_proto(turn) for turn in entry.turns],
                entry.snapshot if entry.HasField("snapshot") else None,
            )
            for entry in entries
        ],
    )


def _parse(data: bytes) -> journal_pb2.JournalEntry:
    try:
        return journal_pb2.JournalEntry.FromString(data)
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a journal entry") from None


def _messages(found: Sequence[task_pb2.Message]) -> list[Message]:
    return [Message(item.role, item.content) for item in found]
