"""Rollouts to bytes and back, with every check that a rollout from another process must pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import google.protobuf.message

from longshore import types as t
from longshore.errors import Rejected
from longshore.proto.v1 import rollout_pb2
from longshore.rpc import convert, token_columns
from longshore.rpc.convert_segment import leading_given, segments_from_proto, segments_to_proto
from longshore.rpc.rollout_checks import check_bounds

Prompt = Callable[[], Sequence[int] | None]


def rollout_to_bytes(rollout: t.Rollout, prompt_digest: bytes = b"") -> bytes:
    """Serialises a rollout for a stream entry, its log-probs rounded (see rpc.token_columns).

    The prompt is left out if it has this digest, its ticket's: then only who issued the ticket can read the rollout.
    """
    prompt = leading_given(rollout.segments)
    left_out = bool(prompt and prompt_digest) and token_columns.prompt_digest(prompt) == prompt_digest
    message = rollout_pb2.Rollout(
        schema_version=convert.SCHEMA_VERSION,
        ref=convert.ref_to_proto(rollout.ref),
        attempt=rollout.attempt,
        origin=rollout_pb2.ORIGIN_TICKET,
        task_id=rollout.task_id,
        purpose=convert.PURPOSE[rollout.purpose],
        segments=segments_to_proto(rollout.segments, left_out),
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
        prompt_digest=prompt_digest if left_out else b"",
    )
    return message.SerializeToString()


def rollout_from_bytes(payload: bytes, prompt: Prompt | None = None) -> t.Rollout:
    """Reads and validates a rollout.

    Args:
        payload: what `rollout_to_bytes` made.
        prompt: gives the token ids of the ticket's prompt, or None; asked only if the rollout leaves them out.

    Raises:
        Rejected: reasons `malformed`, `schema`, `empty`, `oversized`, `span_lengths`, `logprobs`, `turns`, `tables`,
            `versions`, `not_finite`, `sampling`, `reward`; `prompt`: it is left out, and `prompt` gives another one.
    """
    message = rollout_pb2.Rollout()
    try:
        message.ParseFromString(payload)
    except google.protobuf.message.DecodeError:
        raise Rejected("malformed", "not a serialised rollout") from None
    if message.schema_version != convert.SCHEMA_VERSION:
        raise Rejected("schema", f"schema_version {message.schema_version} is not {convert.SCHEMA_VERSION}")
    left_out = _prompt_of(message, prompt) if message.prompt_digest else ()
    rollout = t.Rollout(
        ref=convert.ref_from_proto(message.ref),
        attempt=message.attempt,
        purpose=convert.enum_value(convert.PURPOSE, message.purpose, "purpose"),  # type: ignore[arg-type]
        task_id=message.task_id,
        segments=segments_from_proto(message.segments, left_out),
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


def _prompt_of(message: rollout_pb2.Rollout, prompt: Prompt | None) -> Sequence[int]:
    token_ids = prompt() if prompt is not None else None
    if not token_ids or token_columns.prompt_digest(token_ids) != message.prompt_digest:
        raise Rejected("prompt", "the rollout leaves out a prompt that is not its ticket's")
    return token_ids


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
    check_bounds(rollout)


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
