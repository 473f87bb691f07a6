"""Replies to the events that a generator streams, and back. Knows no gRPC."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from longshore.actor.episode import Reply
from longshore.errors import Rejected
from longshore.proto.v1 import generator_pb2
from longshore.rpc import convert
from longshore.rpc.convert_rollout import engine_from_proto, engine_to_proto
from longshore.types import EngineFingerprint, FinishReason, KvMark, SampledSpan


class ReplyBuilder:
    """Joins a stream's events; neighbours that one version made under one cache become one span."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._spans: list[tuple[tuple[int, int, int | None], list[float]]] = []
        self._finish: FinishReason | None = None
        self._engine: EngineFingerprint | None = None

    def add(self, event: generator_pb2.GenerateResponse) -> None:
        if event.token_ids:
            oldest = event.kv_min_version if event.HasField("kv_min_version") else None
            made_by = (event.policy_version, event.kv, oldest)
            if not self._spans or self._spans[-1][0] != made_by:
                self._spans.append((made_by, []))
            self._token_ids.extend(event.token_ids)
            self._spans[-1][1].extend(event.logprobs)
        if event.finish:
            self._finish = convert.finish_from_proto(event.finish)
        if event.HasField("engine"):
            self._engine = engine_from_proto(event.engine)

    def reply(self) -> Reply | None:
        """The whole reply; None for a stream that ended early."""
        if self._finish is None or self._finish is FinishReason.ABORTED or self._engine is None:
            return None
        spans = [
            SampledSpan(version, tuple(logprobs), kv=_kv(kv), kv_min_version=oldest)
            for (version, kv, oldest), logprobs in self._spans
        ]
        return Reply(self._token_ids, spans, self._finish, self._engine)


def reply_to_events(reply: Reply) -> list[generator_pb2.GenerateResponse]:
    """What a generator would have streamed, in as few events as there are spans (one, without any)."""
    events, start = [], 0
    for span in reply.spans:
        events.append(
            generator_pb2.GenerateResponse(
                token_ids=reply.token_ids[start : start + span.length],
                logprobs=span.logprobs,
                policy_version=span.version,
                kv=convert.KV[span.kv],
                kv_min_version=span.kv_min_version,
            )
        )
        start += span.length
    events = events or [generator_pb2.GenerateResponse()]
    events[0].engine.CopyFrom(engine_to_proto(reply.engine))
    events[-1].finish = convert.FINISH[reply.finish]
    return events


def reply_from_events(events: Iterable[generator_pb2.GenerateResponse]) -> Reply:
    """Raises Rejected: `malformed` unless they are a whole reply whose spans cover its tokens."""
    builder = ReplyBuilder()
    for event in events:
        builder.add(event)
    reply = builder.reply()
    if reply is None or not reply.is_sound:
        raise Rejected("malformed", "not a whole reply")
    return reply


@functools.cache
def _kv(number: int) -> KvMark:
    return convert.kv_from_proto(number)
