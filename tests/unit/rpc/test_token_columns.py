"""Packed columns: what goes in comes out, rounded as promised, and nothing damaged or inflated does."""

import contextlib
import math
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import Rejected
from longshore.rpc.token_columns import (
    LOWEST,
    pack_logprobs,
    pack_token_ids,
    prompt_digest,
    unpack_logprobs,
    unpack_token_ids,
)

LOGPROBS = st.lists(
    st.floats(max_value=0, min_value=-600, width=32) | st.floats(max_value=0, min_value=-(2.0**100), width=32),
    max_size=300,
)
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=300)
# The NaN that GPUs make has all its bits set, and must not round to a number.
ODD_NAN = struct.unpack("f", b"\xff\xff\xff\x7f")[0]


@given(LOGPROBS)
def test_log_probs_come_back_within_the_stated_error(logprobs):
    back = unpack_logprobs(pack_logprobs(logprobs), len(logprobs))
    assert len(back) == len(logprobs)
    for value, original in zip(back, logprobs, strict=True):
        assert abs(value - max(original, LOWEST)) <= 2**-16
        assert value <= 0


@given(LOGPROBS)
def test_packing_again_changes_nothing(logprobs):
    packed = pack_logprobs(logprobs)
    assert pack_logprobs(unpack_logprobs(packed, len(logprobs))) == packed


@pytest.mark.parametrize("bad", [math.nan, -math.nan, ODD_NAN, math.inf, -math.inf, 0.5, 1.1e-4])
def test_what_is_no_log_prob_is_refused(bad):
    for values in ([bad], [-0.5, bad, -0.25], [bad, -1.0], [-1.0, bad]):
        with pytest.raises(Rejected, match="logprobs: log-probs must be finite"):
            unpack_logprobs(pack_logprobs(values), len(values))


def test_what_nobody_draws_counts_as_the_lowest():
    assert unpack_logprobs(pack_logprobs([-1e39, -512.5, -511.5]), 3) == (LOWEST, LOWEST, -511.5)


def test_a_hair_above_zero_is_zero():
    assert unpack_logprobs(pack_logprobs([5e-5, -2.0, -0.0]), 3) == (0.0, -2.0, 0.0)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 1000])
def test_another_number_of_log_probs_is_refused(count):
    with pytest.raises(Rejected, match="logprobs"):
        unpack_logprobs(pack_logprobs([-0.5, -0.25, -3.0]), count)


@given(LOGPROBS.filter(bool), st.data())
def test_damaged_log_probs_are_log_probs_or_refused(logprobs, draw):
    changed = bytearray(pack_logprobs(logprobs))
    changed[draw.draw(st.integers(0, len(changed) - 1))] ^= draw.draw(st.integers(1, 255))
    with contextlib.suppress(Rejected):
        values = unpack_logprobs(bytes(changed), len(logprobs))
        assert len(values) == len(logprobs)
        assert all(math.isfinite(value) and value <= 0 for value in values)


@given(IDS)
def test_ids_come_back(ids):
    assert list(unpack_token_ids(pack_token_ids(ids), len(ids))) == ids


def test_ids_that_do_not_fit_are_the_writers_mistake():
    with pytest.raises(ValueError):
        pack_token_ids([2**32])


@pytest.mark.parametrize("data", [b"", b"x", pack_token_ids([1, 2, 3])[:-1], zstandard.compress(b"\xff" * 9)])
def test_damaged_ids_are_refused(data):
    with pytest.raises(Rejected, match=r"malformed|oversized"):
        unpack_token_ids(data, 3)


@pytest.mark.parametrize("count", [0, 2, 4, 1000])
def test_another_number_of_ids_is_refused(count):
    with pytest.raises(Rejected, match=r"span_lengths|oversized"):
        unpack_token_ids(pack_token_ids([100_000, 200_000, 300_000]), count)


def test_a_small_bomb_does_not_go_off():
    with pytest.raises(Rejected, match="oversized"):
        unpack_token_ids(zstandard.compress(bytes(10_000_000)), 100)
    with pytest.raises(Rejected, match="at most 300"):
        unpack_logprobs(zstandard.compress(bytes(10_000_000)), 100)


def test_a_prompt_has_a_digest_of_its_own():
    assert prompt_digest([1, 2]) == prompt_digest((1, 2)) != prompt_digest([2, 1])
    assert len({prompt_digest(ids) for ids in ([], [0], [0, 0], [1], [256], [65536])}) == 6
