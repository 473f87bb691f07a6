"""A job's rollouts, from where they are: the broker while they are out or wait for the learner, then the batch records.

What a rollout held is on the broker until a durable checkpoint covers it; afterwards it is known which step used it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.protobuf.message
from google.protobuf.json_format import MessageToDict
from redis.asyncio import Redis

from longshore.api_types import Json, RolloutPage, RolloutView, WholeRollout
from longshore.errors import NotFound, Rejected
from longshore.gateway.store import Job
from longshore.proto.v1 import rollout_pb2, verdict_pb2
from longshore.rollout_queue.blobs import Blobs
from longshore.rollout_queue.live import LiveTicket, LiveTickets, order
from longshore.rollout_queue.rollouts import RolloutQueue
from longshore.rpc.convert_segment import segments_from_proto
from longshore.rpc.rollout_checks import MAX_TOKENS
from longshore.types import JobRef, SampledSpan, Segment

KEY = r"^(0|[1-9]\d{0,14})\.(0|[1-9]\d{0,5})$"
TRAINED = "trained"
_RECORDS = Path("learner", "batches.jsonl")


class Rollouts:
    """The rollouts of all jobs. Every method raises Unavailable while the broker is away."""

    def __init__(self, redis: Redis, runs_dir: Path) -> None:
        self._redis = redis
        self._runs_dir = runs_dir

    async def page(
        self, job: Job, limit: int, after: str | None, state: str | None, site: str | None, step: int | None
    ) -> RolloutPage:
        """Rollouts after the rollout `after`, by group and index.

        Args:
            state, site: only those in this state, of this site.
            step: those in the batch of a train step, instead of those that the broker has.
        """
        if step is not None:
            found = await asyncio.to_thread(_batch, self._runs_dir / job.id / _RECORDS, step)
        else:
            found = [_view(ticket) for ticket in await LiveTickets(self._redis, _ref(job)).all()]
        start = order(after) if after else None
        chosen = [
            view
            for view in found
            if (start is None or order(view["id"]) > start)
            and state in (None, view["state"])
            and site in (None, view["site"])
        ]
        page = chosen[:limit]
        return {"rollouts": page, "next": page[-1]["id"] if len(chosen) > limit else None}

    async def whole(self, job: Job, key: str) -> WholeRollout:
        """One rollout with all that is known of it. Raises NotFound."""
        if not re.fullmatch(KEY, key):
            raise NotFound(f"there is no rollout {key!r}: ids look like 12.3")
        ticket = await LiveTickets(self._redis, _ref(job)).get(key)
        # While a checkpoint is due, a rollout is both on the broker and in a batch.
        step = await asyncio.to_thread(_step_of, self._runs_dir / job.id / _RECORDS, key)
        if ticket is None:
            if step is None:
                raise NotFound(f"rollout {key} is neither out nor in a batch: see the ledger and the dead letters")
            return {**_trained(key, step), "content": None}
        view: WholeRollout = {**_view(ticket), "step": step, "content": None}
        if ticket.entry_id is not None:
            view["content"] = await self._content(job, ticket.entry_id)
        return view

    async def _content(self, job: Job, entry_id: str) -> Json | None:
        blobs = Blobs.open((self._runs_dir / job.id / "blobs").as_uri())
        delivery = await RolloutQueue(self._redis, _ref(job), blobs=blobs).look(entry_id)
        if delivery is None or not delivery.payload:
            return None
        return await asyncio.to_thread(content_of, delivery.payload)


def content_of(payload: bytes) -> Json | None:
    """What a rollout's bytes say; None when they cannot be read. The ids of a prompt that was left out are null."""
    message = rollout_pb2.Rollout()
    try:
        message.ParseFromString(payload)
        left_out = message.segments[0].spans[0].length if message.prompt_digest else 0
        if left_out > MAX_TOKENS:
            return None
        segments = segments_from_proto(message.segments, (0,) * left_out)
    except (google.protobuf.message.DecodeError, Rejected, IndexError):
        return None
    verdicts = [_plain(verdict) for verdict in message.verdicts]
    for part in ("segments", "verdicts", "ref", "prompt_digest"):
        message.ClearField(part)
    shown = [_segment(item, 0 if number else left_out) for number, item in enumerate(segments)]
    return {**_plain(message), "segments": shown, "verdicts": verdicts}


def _segment(segment: Segment, left_out: int) -> Json:
    spans: list[Json] = []
    for span in segment.spans:
        if isinstance(span, SampledSpan):
            spans.append({"sampled": span.length, "version": span.version, "logprobs": list(span.logprobs)})
        else:
            spans.append({"given": span.length})
    return {
        "id": segment.segment_id,
        "parent": segment.parent_segment_id,
        "prefix_len": segment.prefix_len,
        "token_ids": [*([None] * left_out), *segment.token_ids[left_out:]],
        "spans": spans,
    }


def _plain(message: rollout_pb2.Rollout | verdict_pb2.Verdict) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _view(ticket: LiveTicket) -> RolloutView:
    return {
        "id": ticket.key,
        "state": ticket.state,
        "site": ticket.site,
        "attempt": ticket.attempt,
        "step": None,
        "bytes": ticket.size,
    }


def _trained(key: str, step: int) -> RolloutView:
    return {"id": key, "state": TRAINED, "site": "", "attempt": 0, "step": step, "bytes": None}


def _batch(path: Path, step: int) -> list[RolloutView]:
    """The rollouts of a train step's batch as it was recorded last, by group and index."""
    newest: dict[str, Any] | None = None
    for line in _records(path, f'"step":{step},'):
        if line["step"] == step:
            newest = line
    keys = {key for key, _ in newest["uses"]} if newest else set()
    return [_trained(key, step) for key in sorted(keys, key=order)]


def _step_of(path: Path, key: str) -> int | None:
    """The train step whose batch has a rollout; the last where it was replayed."""
    steps = [line["step"] for line in _records(path, f'["{key}",') if key in {used for used, _ in line["uses"]}]
    return int(steps[-1]) if steps else None


def _records(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """The whole records in which a text is: most lines need not be parsed."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if text in line and line.endswith("\n"):
                    yield json.loads(line)
    except FileNotFoundError:
        return


def _ref(job: Job) -> JobRef:
    return JobRef(job.project, job.id)
