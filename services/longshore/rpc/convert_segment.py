"""Segments to messages and back. Their tokens travel packed; plain ones, as other writers may send, are read too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from longshore import types as t
from longshore.errors import Rejected
from longshore.proto.v1 import rollout_pb2
from longshore.rpc import convert, token_columns
from longshore.rpc.rollout_checks import MAX_TOKENS


def leading_given(segments: Sequence[t.Segment]) -> Sequence[int]:
    """Token ids of the first segment's first span, where that is given: the prompt. Else none."""
    if not segments or not segments[0].spans or not isinstance(segments[0].spans[0], t.GivenSpan):
        return ()
    return segments[0].token_ids[: segments[0].spans[0].length]


def segments_to_proto(segments: Sequence[t.Segment], without_prompt: bool = False) -> list[rollout_pb2.Segment]:
    """Packs segments; without the ids of `leading_given` on demand."""
    left_out = len(leading_given(segments)) if without_prompt else 0
    return [
        rollout_pb2.Segment(
            segment_id=segment.segment_id,
            parent_segment_id=segment.parent_segment_id or "",
            prefix_len=segment.prefix_len,
            packed_token_ids=token_columns.pack_token_ids(segment.token_ids[0 if number else left_out :]),
            packed_logprobs=_packed_logprobs(segment),
            spans=[_span_to_proto(span) for span in segment.spans],
        )
        for number, segment in enumerate(segments)
    ]


def segments_from_proto(messages: Sequence[rollout_pb2.Segment], prompt: Sequence[int] = ()) -> tuple[t.Segment, ...]:
    """Reads segments; `prompt` are the ids that the first one leaves out.

    Raises:
        Rejected: reasons `oversized`, `span_lengths`, `logprobs`, `malformed`.
    """
    # Before anything is unpacked: what is packed has the size that the spans say.
    if sum(span.length for message in messages for span in message.spans) > MAX_TOKENS:
        raise Rejected("oversized", f"more than {MAX_TOKENS} tokens")
    return tuple(_segment_from_proto(item, () if number else prompt) for number, item in enumerate(messages))


def _packed_logprobs(segment: t.Segment) -> bytes:
    logprobs = [value for span in segment.spans if isinstance(span, t.SampledSpan) for value in span.logprobs]
    return token_columns.pack_logprobs(logprobs) if logprobs else b""


def _span_to_proto(span: t.Span) -> rollout_pb2.Span:
    if isinstance(span, t.GivenSpan):
        return rollout_pb2.Span(kind=rollout_pb2.SPAN_KIND_GIVEN, length=span.length)
    return rollout_pb2.Span(
        kind=rollout_pb2.SPAN_KIND_SAMPLED,
        length=span.length,
        policy_version=span.version,
        sampling_index=span.sampling_index,
        engine_index=span.engine_index,
        kv=convert.KV[span.kv],
        kv_min_version=span.kv_min_version,
    )


def _segment_from_proto(message: rollout_pb2.Segment, prompt: Sequence[int]) -> t.Segment:
    if prompt and not (message.spans and message.spans[0].kind == rollout_pb2.SPAN_KIND_GIVEN):
        raise Rejected("prompt", "the prompt is left out where no given span stands for it")
    if prompt and message.spans[0].length != len(prompt):
        raise Rejected("prompt", f"the prompt has {len(prompt)} tokens, its span {message.spans[0].length}")
    count = sum(span.length for span in message.spans) - len(prompt)
    token_ids = _token_ids(message, count)
    if len(token_ids) != count:
        raise Rejected("span_lengths", f"segment {message.segment_id[:40]}: spans do not add up to its tokens")
    logprobs = _logprobs(message)
    return t.Segment(
        segment_id=message.segment_id,
        token_ids=(*prompt, *token_ids) if prompt else token_ids,
        spans=tuple(_span_from_proto(item, logprobs) for item in message.spans),
        parent_segment_id=message.parent_segment_id or None,
        prefix_len=message.prefix_len,
    )


def _token_ids(message: rollout_pb2.Segment, count: int) -> tuple[int, ...]:
    if not message.packed_token_ids:
        return tuple(message.token_ids)
    if message.token_ids:
        raise Rejected("malformed", "token ids both plain and packed")
    return token_columns.unpack_token_ids(message.packed_token_ids, count)


def _logprobs(message: rollout_pb2.Segment) -> Iterator[tuple[float, ...]]:
    """Those of one sampled span after the other."""
    sampled = [span for span in message.spans if span.kind == rollout_pb2.SPAN_KIND_SAMPLED]
    if not message.packed_logprobs:
        for span in sampled:
            yield _checked(tuple(span.logprobs), span.length)
        return
    if any(span.logprobs for span in sampled):
        raise Rejected("malformed", "log-probs both plain and packed")
    values = token_columns.unpack_logprobs(message.packed_logprobs, sum(span.length for span in sampled))
    start = 0
    for span in sampled:
        yield values[start : start + span.length]
        start += span.length


def _checked(logprobs: tuple[float, ...], length: int) -> tuple[float, ...]:
    if len(logprobs) != length:
        raise Rejected("logprobs", f"{len(logprobs)} log-probs for {length} sampled tokens")
    if not all(math.isfinite(value) and value <= token_columns.ABOVE_ZERO for value in logprobs):
        raise Rejected("logprobs", "log-probs must be finite and not above 0")
    return logprobs


def _span_from_proto(message: rollout_pb2.Span, logprobs: Iterator[tuple[float, ...]]) -> t.Span:
    if message.length < 1:
        raise Rejected("span_lengths", "a span has no tokens")
    if message.kind == rollout_pb2.SPAN_KIND_GIVEN:
        return t.GivenSpan(message.length)
    if message.kind != rollout_pb2.SPAN_KIND_SAMPLED:
        raise Rejected("malformed", f"span kind {message.kind} is unknown")
    return t.SampledSpan(
        version=message.policy_version,
        logprobs=next(logprobs),
        sampling_index=message.sampling_index,
        engine_index=message.engine_index,
        kv=convert.kv_from_proto(message.kv),
        kv_min_version=message.kv_min_version if message.HasField("kv_min_version") else None,
    )
