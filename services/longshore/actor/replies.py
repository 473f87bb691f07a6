"""Replies to the events that generators stream, and back. Knows no gRPC."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from longshore.actor.episode import Reply
from longshore.errors import Rejected
from longshore.proto.v1 import generator_pb2
from longshore.rpc import convert
from longshore.rpc.convert_rollout import engine_from_proto, engine_to_proto
from longshore.types import EngineFingerprint, FinishReason, KvMark, SampledSpan, Sampling


class ReplyBuilder:
    """Joins the events of one reply, drawn by one generator or by several that went on after each other; neighbours
    that one engine and version made under one cache become one span."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._spans: list[tuple[tuple[int, int, int, int | None], list[float]]] = []
        self._finish: FinishReason | None = None
        self._engines: list[EngineFingerprint] = []
        self._engine: int | None = None

    def begin(self) -> None:
        """Another stream begins; its engine comes with its first event."""
        self._engine = None

    def add(self, event: generator_pb2.ReplyEvent) -> None:
        """Raises Rejected: `malformed`, and takes nothing of an event that cannot be part of a rollout."""
        if len(event.token_ids) != len(event.logprobs) or not all(map(math.isfinite, event.logprobs)):
            raise Rejected("malformed", "an event's log-probs are not one finite number a token")
        if event.HasField("engine"):
            engine = engine_from_proto(event.engine)
            if engine not in self._engines:
                self._engines.append(engine)
            self._engine = self._engines.index(engine)
        if self._engine is None:
            raise Rejected("malformed", "a reply's first event does not say which engine draws it")
        if event.token_ids:
            _kv(event.kv)
            oldest = event.kv_min_version if event.HasField("kv_min_version") else None
            made_by = (self._engine, event.policy_version, event.kv, oldest)
            if not self._spans or self._spans[-1][0] != made_by:
                self._spans.append((made_by, []))
            self.token_ids.extend(event.token_ids)
            self._spans[-1][1].extend(event.logprobs)
        if event.finish:
            self._finish = convert.finish_from_proto(event.finish)

    def close(self, sampling: Sampling) -> None:
        """Ends a reply that needs no further token, although nobody has said so."""
        if self._finish in (None, FinishReason.ABORTED):
            self._finish = None
            if self.token_ids and self.token_ids[-1] in sampling.stop_token_ids:
                self._finish = FinishReason.STOP
            elif len(self.token_ids) >= sampling.max_new_tokens:
                self._finish = FinishReason.LENGTH

    def reply(self) -> Reply | None:
        """The whole reply; None for one that is not finished."""
        if self._finish is None or self._finish is FinishReason.ABORTED:
            return None
        spans = [
            SampledSpan(version, tuple(logprobs), engine_index=engine, kv=_kv(kv), kv_min_version=oldest)
            for (engine, version, kv, oldest), logprobs in self._spans
        ]
        return Reply(self.token_ids, spans, self._finish, tuple(self._engines))


def reply_to_events(reply: Reply) -> list[generator_pb2.ReplyEvent]:
    """What generators would have streamed, in as few events as there are spans (one, without any)."""
    events, start, told = [], 0, -1
    for span in reply.spans:
        event = generator_pb2.ReplyEvent(
            token_ids=reply.token_ids[start : start + span.length],
            logprobs=span.logprobs,
            policy_version=span.version,
            kv=convert.KV[span.kv],
            kv_min_version=span.kv_min_version,
        )
        if span.engine_index != told:
            told = span.engine_index
            event.engine.CopyFrom(engine_to_proto(reply.engines[told]))
        events.append(event)
        start += span.length
    if not events:
        events = [generator_pb2.ReplyEvent(engine=engine_to_proto(reply.engines[0]))]
    events[-1].finish = convert.FINISH[reply.finish]
    return events


def reply_from_events(events: Iterable[generator_pb2.ReplyEvent]) -> Reply:
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
