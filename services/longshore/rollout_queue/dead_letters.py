"""What was set aside, for people: tickets that came to nothing and rollouts that failed validation, with the reason.

The broker keeps about the newest thousand of a job. Every method raises BrokerLost when the broker stays away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import google.protobuf.message
from redis.asyncio import Redis

from longshore.errors import Conflict, NotFound
from longshore.proto.v1 import ticket_pb2
from longshore.rollout_queue import broker
from longshore.rollout_queue.keys import JobKeys
from longshore.types import JobRef

MAX_REQUEUES = 10_000
_ID = re.compile(r"\d{1,20}-\d{1,20}")


@dataclass(frozen=True)
class DeadLetter:
    """One ticket or rollout that was set aside.

    Example: DeadLetter("1764-0", 1764.0, "rollout", "12.3", "west", "logprobs", "3 log-probs for 4 tokens", 1, ...)
    """

    letter_id: str
    # Unix seconds.
    at: float
    # "ticket" | "rollout"
    kind: str
    ticket_key: str
    site: str
    reason: str
    detail: str
    attempt: int
    # The ticket, or the rollout as it came (packed); empty when it was too large to keep.
    payload: bytes
    payload_bytes: int
    # Serialised Task, empty when nobody knew it.
    task: bytes


class DeadLetters:
    """The dead letters of one job at the broker of one site."""

    def __init__(self, redis: Redis, job: JobRef, site: str = "home") -> None:
        self._redis = redis
        self._keys = JobKeys(job, site)

    async def list(self, after: str = "", count: int = 100) -> list[DeadLetter]:
        """Up to `count` letters after the letter `after`, oldest first. Raises NotFound for an id that is none."""
        first = f"({_checked(after)}" if after else "-"
        with broker.reaching():
            found = await self._redis.xrange(self._keys.dead, min=first, count=count)
        return [_letter(entry_id, fields) for entry_id, fields in broker.entries(found)]

    async def count(self) -> int:
        """How many letters are kept."""
        with broker.reaching():
            return int(await self._redis.xlen(self._keys.dead))

    async def get(self, letter_id: str) -> DeadLetter:
        """Raises NotFound."""
        with broker.reaching():
            found = await self._redis.xrange(self._keys.dead, min=_checked(letter_id), max=letter_id)
        if not found:
            raise NotFound(f"there is no dead letter {letter_id}")
        return _letter(*broker.entries(found)[0])

    async def requeue(self, letter_id: str) -> None:
        """Asks the learner to attempt the letter's task again, as a new group; the old ticket keeps its reason.

        Raises:
            NotFound: no such letter.
            Conflict: its task is not known.
        """
        letter = await self.get(letter_id)
        if not letter.task:
            raise Conflict(f"dead letter {letter_id} ({letter.reason}) does not say which task it was for")
        with broker.reaching():
            await self._redis.xadd(
                self._keys.requeues,
                {"letter": letter_id, "task": letter.task},
                maxlen=MAX_REQUEUES,
                approximate=True,
            )


def _checked(letter_id: str) -> str:
    if not _ID.fullmatch(letter_id):
        raise NotFound(f"there is no dead letter {letter_id!r}: ids look like 1764000000000-0")
    return letter_id


def _letter(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    def word(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    kind, payload = word(b"kind"), fields.get(b"payload", b"")
    attempt = word(b"attempt")
    return DeadLetter(
        letter_id=entry_id,
        at=int(entry_id.partition("-")[0]) / 1000,
        kind=kind,
        ticket_key=word(b"key"),
        site=word(b"site"),
        reason=word(b"reason"),
        detail=word(b"detail"),
        attempt=int(attempt) if attempt.isdigit() else 0,
        payload=payload,
        payload_bytes=int(word(b"payload_bytes") or len(payload)),
        task=_task_of(payload) if kind == "ticket" else fields.get(b"task", b""),
    )


def _task_of(ticket: bytes) -> bytes:
    try:
        return ticket_pb2.Ticket.FromString(ticket).task.SerializeToString()
    except google.protobuf.message.DecodeError:
        return b""
