"""Packing of rollouts: what goes in comes out, and nothing damaged or inflated does."""

import contextlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import IntegrityError, Rejected
from longshore.rollout_queue import payload
from longshore.rollout_queue.payload import Packed, decode, encode


@given(st.binary(max_size=2000), st.integers(1, 50))
def test_what_goes_in_comes_out(data, times):
    packed = encode(data * times)
    assert decode(packed) == data * times
    assert len(packed.data) <= len(data * times)


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_a_changed_byte_is_noticed(data, draw):
    packed = encode(data * 5)
    at = draw.draw(st.integers(0, len(packed.data) - 1))
    changed = bytearray(packed.data)
    changed[at] ^= 0xFF
    # zstd ignores a few bits of its header; whatever is accepted must be the payload.
    with contextlib.suppress(IntegrityError, Rejected):
        assert decode(Packed(packed.codec, bytes(changed), packed.digest)) == data * 5


def test_a_small_bomb_does_not_go_off(monkeypatch):
    monkeypatch.setattr(payload, "MAX_BYTES", 1_000_000)
    with pytest.raises(Rejected, match="oversized"):
        decode(Packed("zstd", zstandard.compress(bytes(1_000_001)), ""))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10))
    with pytest.raises(Rejected, match="oversized"):
        decode(Packed("zstd", unsized, ""))


@pytest.mark.parametrize("packed", [Packed("gzip", b"", ""), Packed("", b"", "")])
def test_an_unknown_codec_is_refused(packed):
    with pytest.raises(Rejected, match="codec"):
        decode(packed)


@pytest.mark.parametrize("data", [b"", b"not zstd", zstandard.compress(b"x" * 1000)[:-3]])
def test_a_damaged_frame_is_refused(data):
    with pytest.raises(IntegrityError):
        decode(Packed("zstd", data, encode(b"x" * 1000).digest))
