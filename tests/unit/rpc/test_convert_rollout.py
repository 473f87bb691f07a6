"""Rollouts as bytes: whole again on the other side, small on the way, and refused when they do not fit."""

from dataclasses import replace

import pytest
from builders import rollout

from longshore.errors import Rejected
from longshore.proto.v1 import rollout_pb2
from longshore.rpc.convert_rollout import rollout_from_bytes, rollout_to_bytes
from longshore.rpc.token_columns import pack_logprobs, pack_token_ids, prompt_digest
from longshore.types import GivenSpan, SampledSpan, Segment, Turn

PROMPT = (5, 6, 300_000)
# Numbers that need no rounding.
LOGPROBS = (-0.5, -0.25)
MADE = rollout(3, 1, prompt=PROMPT, logprobs=LOGPROBS)


def two_segments():
    first = MADE.segments[0]
    spans = (GivenSpan(1), SampledSpan(4, (-1.0,)), GivenSpan(2), SampledSpan(5, (-2.0, -3.0)))
    second = Segment("1", (9, 10, 11, 12, 13, 14), spans, parent_segment_id="0", prefix_len=2)
    turns = (*MADE.turns, Turn("1", 1, 1, MADE.finish), Turn("1", 4, 2, MADE.finish))
    return replace(MADE, segments=(first, second), turns=turns)


def changed(edit, made=MADE):
    message = rollout_pb2.Rollout.FromString(rollout_to_bytes(made))
    edit(message)
    return message.SerializeToString()


@pytest.mark.parametrize("made", [MADE, two_segments()])
def test_a_rollout_comes_back(made):
    assert rollout_from_bytes(rollout_to_bytes(made)) == made
    digest = prompt_digest(PROMPT)
    assert rollout_from_bytes(rollout_to_bytes(made, digest), lambda: PROMPT) == made


def test_plain_tokens_are_read_too():
    def plain(message):
        for segment, original in zip(message.segments, made.segments, strict=True):
            segment.token_ids[:] = original.token_ids
            segment.packed_token_ids = segment.packed_logprobs = b""
            for span, was in zip(segment.spans, original.spans, strict=True):
                span.logprobs[:] = was.logprobs if isinstance(was, SampledSpan) else ()

    made = two_segments()
    assert rollout_from_bytes(changed(plain, made)) == made


def test_a_prompt_is_left_out_only_under_its_own_digest():
    digest = prompt_digest(PROMPT)
    whole, without = rollout_to_bytes(MADE), rollout_to_bytes(MADE, digest)
    assert rollout_to_bytes(MADE, prompt_digest((5, 6))) == whole
    assert rollout_pb2.Rollout.FromString(without).segments[0].packed_token_ids == pack_token_ids((7, 1))


@pytest.mark.parametrize("prompt", [None, lambda: None, tuple, lambda: (5, 6), lambda: (6, 5, 300_000)])
def test_another_prompt_is_refused(prompt):
    with pytest.raises(Rejected, match="prompt"):
        rollout_from_bytes(rollout_to_bytes(MADE, prompt_digest(PROMPT)), prompt)


def test_no_prompt_is_put_where_none_is_missing():
    def claim(message):
        message.prompt_digest = prompt_digest((7, 1))

    with pytest.raises(Rejected, match="prompt"):
        rollout_from_bytes(changed(claim), lambda: (7, 1))

    def sampled_first(message):
        del message.segments[0].spans[0]
        claim(message)

    with pytest.raises(Rejected, match="prompt"):
        rollout_from_bytes(changed(sampled_first), lambda: (7, 1))


def both_ids(message):
    message.segments[0].token_ids[:] = [1]


def both_logprobs(message):
    message.segments[0].spans[1].logprobs[:] = LOGPROBS


def few_logprobs(message):
    message.segments[0].packed_logprobs = pack_logprobs(LOGPROBS[:1])


def no_logprobs(message):
    message.segments[0].packed_logprobs = b""


def few_ids(message):
    message.segments[0].packed_token_ids = pack_token_ids(PROMPT)


def huge_span(message):
    message.segments[0].spans[0].length = 4_000_000


def empty_span(message):
    message.segments[0].spans.add(kind=rollout_pb2.SPAN_KIND_GIVEN)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (both_ids, "malformed"),
        (both_logprobs, "malformed"),
        (few_logprobs, "logprobs"),
        (no_logprobs, "logprobs"),
        (few_ids, "span_lengths"),
        (huge_span, "oversized"),
        (empty_span, "span_lengths"),
    ],
)
def test_columns_that_do_not_fit_are_refused(edit, reason):
    with pytest.raises(Rejected) as refused:
        rollout_from_bytes(changed(edit))
    assert refused.value.reason == reason
