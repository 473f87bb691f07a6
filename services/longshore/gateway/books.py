"""What is known of a job's tickets: the broker's counts and dead letters, and of a job that has ended, what was kept.

The broker forgets a job soon after its end; before that, `close` leaves its books in the job's folder.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google.protobuf.message
import structlog
from redis.asyncio import Redis

from longshore.api_types import Json, LearnerIssued, LedgerView, LetterView, WholeLetter
from longshore.errors import Conflict, NotFound
from longshore.gateway.store import Job
from longshore.gateway.streams import iso_time
from longshore.proto.v1 import task_pb2
from longshore.rollout_queue import broker
from longshore.rollout_queue.dead_letters import DeadLetter, DeadLetters
from longshore.rollout_queue.ledger import Ledger
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rpc import convert
from longshore.types import JobRef, Verdict

log = structlog.get_logger()

_PAGE = 200
_LEDGER, _LETTERS = "ledger.json", "dead_letters.json"


class Books:
    """The books of all jobs. Every method raises Unavailable while the broker is away."""

    def __init__(self, redis: Redis, runs_dir: Path) -> None:
        self._redis = redis
        self._runs_dir = runs_dir

    async def ledger(self, job: Job) -> LedgerView:
        """Tickets issued, by state and by site, and what the learner's own books said at its last train step."""
        kept: LedgerView | None = await self._kept(job, _LEDGER)
        return kept if kept is not None else await self._ledger(job)

    async def letters(self, job: Job, after: str, limit: int) -> list[LetterView]:
        """Up to `limit` dead letters after the letter `after`, oldest first, without their payloads."""
        kept = await self._kept(job, _LETTERS)
        if kept is not None:
            ids = [letter["id"] for letter in kept["letters"]]
            if after and after not in ids:
                raise NotFound(f"there is no dead letter {after}")
            start = ids.index(after) + 1 if after else 0
            return list(kept["letters"][start : start + limit])
        return [_view(letter) for letter in await self._letters(job).list(after, limit)]

    async def letter(self, job: Job, letter_id: str) -> WholeLetter:
        """One dead letter whole. Raises NotFound."""
        kept = await self._kept(job, _LETTERS)
        if kept is None:
            letter = await self._letters(job).get(letter_id)
            return {**_view(letter), "payload": base64.b64encode(letter.payload).decode()}
        found: LetterView
        for found in kept["letters"]:
            if found["id"] == letter_id:
                return {**found, "payload": ""}
        raise NotFound(f"there is no dead letter {letter_id}")

    async def requeue(self, job: Job, letter_id: str) -> None:
        """Asks the learner to attempt a letter's task again. Raises NotFound, Conflict."""
        _require_going(job)
        await self._letters(job).requeue(letter_id)

    async def judge(self, job: Job, ticket_key: str, verdict: Verdict) -> None:
        """Hands in the verdict that a rollout awaits. Raises NotFound, Conflict."""
        _require_going(job)
        data = convert.verdict_to_proto(verdict).SerializeToString()
        await RolloutQueue(self._redis, _ref(job)).deliver_verdict(ticket_key, data)

    async def close(self, job: Job) -> None:
        """Leaves the books of a job that has ended in its folder, and has the broker forget the job."""
        try:
            await self._keep(job)
        except OSError as error:
            # A full disk must not keep the broker full too.
            log.warning("books not kept", job=job.id, reason=str(error))
        await broker.forget_job(self._redis, _ref(job))

    async def _keep(self, job: Job) -> None:
        letters: list[LetterView] = []
        while page := await self._letters(job).list(letters[-1]["id"] if letters else "", _PAGE):
            letters += map(_view, page)
        ledger = await self._ledger(job)
        await asyncio.to_thread(_write, self._folder(job) / _LETTERS, {"letters": letters})
        await asyncio.to_thread(_write, self._folder(job) / _LEDGER, ledger)

    async def _ledger(self, job: Job) -> LedgerView:
        counts = await Ledger(self._redis, _ref(job)).counts()
        issued = job.progress.get("tickets/issued")
        learner: LearnerIssued | None = None
        if isinstance(issued, (int, float)):
            learner = {
                "issued": int(issued),
                "at_step": step if isinstance(step := job.progress.get("step"), int) else None,
            }
        return {
            "issued": counts.issued,
            "states": counts.states,
            "by_site": counts.by_site,
            "balanced": counts.balanced,
            "bytes_waiting": counts.bytes_waiting,
            "learner": learner,
        }

    def _letters(self, job: Job) -> DeadLetters:
        return DeadLetters(self._redis, _ref(job))

    def _folder(self, job: Job) -> Path:
        return self._runs_dir / job.id

    async def _kept(self, job: Job, name: str) -> Any:
        """What `_keep` wrote; None when there is nothing."""
        if not job.state.ended:
            return None
        try:
            text = await asyncio.to_thread((self._folder(job) / name).read_text, "utf-8")
        except FileNotFoundError:
            return None
        return json.loads(text)


def _ref(job: Job) -> JobRef:
    return JobRef(job.project, job.id)


def _require_going(job: Job) -> None:
    if job.state.ended:
        raise Conflict(f"job {job.id} is {job.state.value}")


def _view(letter: DeadLetter) -> LetterView:
    return {
        "id": letter.letter_id,
        "at": iso_time(letter.at),
        "kind": letter.kind,
        "ticket": letter.ticket_key,
        "site": letter.site,
        "reason": letter.reason,
        "detail": letter.detail,
        "attempt": letter.attempt,
        "payload_bytes": letter.payload_bytes,
        "task": _task(letter.task),
    }


def _task(data: bytes) -> Json | None:
    """Enough of a task to know it by; None when nobody knew which it was."""
    if not data:
        return None
    try:
        task = task_pb2.Task.FromString(data)
    except google.protobuf.message.DecodeError:
        return None
    return {"id": task.task_id, "messages": [{"role": m.role, "content": m.content} for m in task.messages]}


def _write(path: Path, value: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
