"""Token ids and log-probs as packed bytes, for a link that is paid by the byte (rollout.proto tells the format).

What is alike lies together: most log-probs are near 0, so their upper bytes pack well among themselves.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Sequence
from typing import TypeVar

import google.protobuf.message

from longshore.errors import IntegrityError, Rejected
from longshore.proto.v1 import rollout_pb2
from longshore.rpc.compression import compress, decompress

Number = TypeVar("Number", int, float)

# Float32 arithmetic may put the log-prob of a near-certain token a little above 0.
ABOVE_ZERO = 1e-4
_DIGEST_BYTES = 16
# A uint32 is at most five bytes long; the column's own header at most six.
_ID_BYTES, _HEADER_BYTES = 5, 6
# Log-probs travel as multiples of a step, in 24 bits: the largest number is no log-prob, the one before the lowest one.
_STEPS, _NO_LOGPROB = 2.0**15, 2**24 - 1
_STEP, _MOST = 1 / _STEPS, _NO_LOGPROB - 1
LOWEST = -_MOST * _STEP


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Packs ids of 32 bits; ValueError for others."""
    return compress(rollout_pb2.TokenIds(ids=token_ids).SerializeToString())


def unpack_token_ids(data: bytes, count: int) -> tuple[int, ...]:
    """The ids again. Raises Rejected `malformed` or `oversized`, or `span_lengths` unless there are `count` of them."""
    message = rollout_pb2.TokenIds()
    try:
        message.ParseFromString(decompress(data, _ID_BYTES * count + _HEADER_BYTES))
    except (IntegrityError, google.protobuf.message.DecodeError):
        raise Rejected("malformed", "the packed token ids are damaged") from None
    if len(message.ids) != count:
        raise Rejected("span_lengths", f"{len(message.ids)} packed token ids where the spans have {count}")
    return tuple(message.ids)


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Packs log-probs, rounded to multiples of 2^-15; packing what was unpacked gives the same bytes.

    What counts is the error of a ratio of probabilities, which is that of a difference of log-probs: an absolute one,
    of at most 2^-16. One below LOWEST, which nobody draws, becomes LOWEST. What is no log-prob (NaN, infinite, above 0)
    is packed too, as a mark that `unpack_logprobs` refuses: whoever reads a rollout judges it.
    """
    try:
        steps = array("I", [int(0.5 - value * _STEPS) for value in logprobs])
        ordinary = not logprobs or max(steps) <= _MOST
    except (ValueError, OverflowError):
        ordinary = False
    if not ordinary:
        steps = array("I", map(_num_steps, logprobs))
    planes = _swapped(steps).tobytes()
    return compress(planes[1::4] + planes[2::4] + planes[3::4])


def unpack_logprobs(data: bytes, count: int) -> tuple[float, ...]:
    """`count` log-probs. Raises Rejected `logprobs` for another number of them, or for what is no log-prob."""
    try:
        found = decompress(data, 3 * count)
    except (IntegrityError, Rejected) as error:
        raise Rejected("logprobs", f"not {count} packed log-probs: {error}") from None
    if len(found) != 3 * count:
        raise Rejected("logprobs", f"{len(found)} bytes of packed log-probs for {count} sampled tokens")
    planes = bytearray(4 * count)
    planes[1::4], planes[2::4], planes[3::4] = found[:count], found[count : 2 * count], found[2 * count :]
    steps = _swapped(array("I", bytes(planes)))
    if count and max(steps) > _MOST:
        raise Rejected("logprobs", "log-probs must be finite and not above 0")
    return tuple([step * -_STEP for step in steps])


def prompt_digest(token_ids: Sequence[int]) -> bytes:
    """What a ticket and a rollout name a prompt by. Raises OverflowError for ids that are not of 32 bits."""
    return hashlib.sha256(_swapped(array("I", token_ids))).digest()[:_DIGEST_BYTES]


def _num_steps(logprob: float) -> int:
    """For whatever there may be in place of a log-prob."""
    if not -math.inf < logprob <= ABOVE_ZERO:
        return _NO_LOGPROB
    return int(0.5 - max(min(logprob, 0.0), LOWEST) * _STEPS)


def _swapped(values: array[Number]) -> array[Number]:
    """From this machine's order of bytes to big-endian, or back."""
    if sys.byteorder == "little":
        values.byteswap()
    return values
