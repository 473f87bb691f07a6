"""Rollouts to bytes and back, with every check that a rollout from another process must pass."""

from __future__ import annotations

import json
import math

import google.protobuf.message

from longshore import types as t
from longshore.errors import Rejected
from longshore.proto.v1 import rollout_pb2
from longshore.rpc import convert

MAX_TOKENS = 4_000_000


def rollout_to_bytes(rollout: t.Rollout) -> bytes:
    """Serialises a rollout for a stream entry."""
    message = rollout_pb2.Rollout(
        schema_version=convert.SCHEMA_VERSION,
        ref=convert.ref_to_proto(rollout.ref),
        attempt=rollout.attempt,
        origin=rollout_pb2.ORIGIN_TICKET,
        task_id=rollout.task_id,
        purpose=convert.PURPOSE[rollout.purpose],
        segments=[_segment_to_proto(segment) for segment in rollout.segments],
        turns=[_turn_to_proto(turn) for turn in rollout.turns],
        sampling=[convert.sampling_to_proto(item) for item in rollout.sampling],
        engines=[engine_to_proto(item) for item in rollout.engines],
        min_version=rollout.min_version,
        max_version=rollout.max_version,
        verdicts=[convert.verdict_to_proto(item) for item in rollout.verdicts],
        finish=convert.FINISH[rollout.finish],
        started_at=convert.timestamp(rollout.started_at),
        finished_at=convert.timestamp(rollout.finished_at),
        site=rollout.site,
        actor=rollout.actor,
    )
    return message.SerializeToString()


def rollout_from_bytes(payload: bytes) -> t.Rollout:
    """Reads and validates a rollout.

    Raises:
        Rejected: reasons `malformed`, `schema`, `empty`, `oversized`, `span_lengths`, `logprobs`, `turns`, `tables`,
            `versions`, `not_finite`, `sampling`.
    """
    message = rollout_pb2.Rollout()
    try:
        message.ParseFromString(payload)
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a serialised rollout") from None
    if message.schema_version != convert.SCHEMA_VERSION:
        raise Rejected("schema", f"schema_version {message.schema_version} is not {convert.SCHEMA_VERSION}")
    segments = tuple(_segment_from_proto(item) for item in message.segments)
    if sum(len(segment.token_ids) for segment in segments) > MAX_TOKENS:
        raise Rejected("oversized", f"more than {MAX_TOKENS} tokens")
    rollout = t.Rollout(
        ref=convert.ref_from_proto(message.ref),
        attempt=message.attempt,
        purpose=convert.enum_value(convert.PURPOSE, message.purpose, "purpose"),  # type: ignore[arg-type]
        task_id=message.task_id,
        segments=segments,
        turns=tuple(_turn_from_proto(item) for item in message.turns),
        sampling=tuple(convert.sampling_from_proto(item) for item in message.sampling),
        engines=tuple(engine_from_proto(item) for item in message.engines),
        finish=convert.finish_from_proto(message.finish),
        started_at=convert.seconds(message.started_at),
        finished_at=convert.seconds(message.finished_at),
        site=message.site,
        actor=message.actor,
        verdicts=tuple(convert.verdict_from_proto(item) for item in message.verdicts),
    )
    _check(rollout, message)
    return rollout


def engine_to_proto(engine: t.EngineFingerprint) -> rollout_pb2.EngineFingerprint:
    return rollout_pb2.EngineFingerprint(
        engine=engine.engine,
        engine_version=engine.engine_version,
        dtype=engine.dtype,
        config_digest=engine.config_digest,
    )


def engine_from_proto(message: rollout_pb2.EngineFingerprint) -> t.EngineFingerprint:
    return t.EngineFingerprint(message.engine, message.engine_version, message.dtype, message.config_digest)


def _check(rollout: t.Rollout, message: rollout_pb2.Rollout) -> None:
    spans = rollout.sampled_spans
    if not spans:
        raise Rejected("empty", "a rollout needs at least one sampled token")
    for span in spans:
        if span.sampling_index >= len(rollout.sampling) or span.engine_index >= len(rollout.engines):
            raise Rejected("tables", "a span points outside the sampling or engine table")
    if (message.min_version, message.max_version) != (rollout.min_version, rollout.max_version):
        raise Rejected("versions", "min_version and max_version do not match the spans")
    lengths: dict[str, int] = {}
    for segment in rollout.segments:
        # A parent stands before its child, so that no chain of prefixes can be a ring.
        if segment.segment_id in lengths:
            raise Rejected("malformed", "two segments share one id")
        if segment.parent_segment_id is not None and segment.prefix_len > lengths.get(segment.parent_segment_id, -1):
            raise Rejected("malformed", f"segment {segment.segment_id} extends what is not there")
        lengths[segment.segment_id] = len(segment.token_ids)
    for turn in rollout.turns:
        if turn.length < 1 or turn.start + turn.length > lengths.get(turn.segment_id, -1):
            raise Rejected("turns", "a turn lies outside its segment")


def _segment_to_proto(segment: t.Segment) -> rollout_pb2.Segment:
    return rollout_pb2.Segment(
        segment_id=segment.segment_id,
        parent_segment_id=segment.parent_segment_id or "",
        prefix_len=segment.prefix_len,
        token_ids=segment.token_ids,
        spans=[_span_to_proto(span) for span in segment.spans],
    )


def _span_to_proto(span: t.Span) -> rollout_pb2.Span:
    if isinstance(span, t.GivenSpan):
        return rollout_pb2.Span(kind=rollout_pb2.SPAN_KIND_GIVEN, length=span.length)
    return rollout_pb2.Span(
        kind=rollout_pb2.SPAN_KIND_SAMPLED,
        length=span.length,
        policy_version=span.version,
        logprobs=span.logprobs,
        sampling_index=span.sampling_index,
        engine_index=span.engine_index,
        kv=convert.KV[span.kv],
        kv_min_version=span.kv_min_version,
    )


def _segment_from_proto(message: rollout_pb2.Segment) -> t.Segment:
    spans = tuple(_span_from_proto(item) for item in message.spans)
    if sum(span.length for span in spans) != len(message.token_ids):
        raise Rejected("span_lengths", f"segment {message.segment_id}: spans do not add up to its tokens")
    return t.Segment(
        segment_id=message.segment_id,
        token_ids=tuple(message.token_ids),
        spans=spans,
        parent_segment_id=message.parent_segment_id or None,
        prefix_len=message.prefix_len,
    )


def _span_from_proto(message: rollout_pb2.Span) -> t.Span:
    if message.length < 1:
        raise Rejected("span_lengths", "a span has no tokens")
    if message.kind == rollout_pb2.SPAN_KIND_GIVEN:
        return t.GivenSpan(message.length)
    if message.kind != rollout_pb2.SPAN_KIND_SAMPLED:
        raise Rejected("malformed", f"span kind {message.kind} is unknown")
    if len(message.logprobs) != message.length:
        raise Rejected("logprobs", f"{len(message.logprobs)} log-probs for {message.length} sampled tokens")
    if not all(math.isfinite(value) and value <= 1e-4 for value in message.logprobs):
        raise Rejected("logprobs", "log-probs must be finite and not above 0")
    return t.SampledSpan(
        version=message.policy_version,
        logprobs=tuple(message.logprobs),
        sampling_index=message.sampling_index,
        engine_index=message.engine_index,
        kv=convert.kv_from_proto(message.kv),
        kv_min_version=message.kv_min_version if message.HasField("kv_min_version") else None,
    )


def _turn_to_proto(turn: t.Turn) -> rollout_pb2.Turn:
    return rollout_pb2.Turn(
        segment_id=turn.segment_id,
        start=turn.start,
        length=turn.length,
        finish=convert.FINISH[turn.finish],
        info_json=json.dumps(turn.info) if turn.info else "",
    )


def _turn_from_proto(message: rollout_pb2.Turn) -> t.Turn:
    return t.Turn(
        segment_id=message.segment_id,
        start=message.start,
        length=message.length,
        finish=convert.finish_from_proto(message.finish),
        info=convert.json_object(message.info_json, "turn.info_json"),
    )
