"""Token ids and log-probs as packed bytes, for a link that is paid by the byte (rollout.proto tells the format).

What is alike lies together: the exponents of log-probs pack well among themselves and badly between mantissas, which
do not pack at all. Whole columns are handled as one long integer, so that no loop over tokens runs in Python.
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
# Of a float32: all but its sign; the sign; half of the last bit that is kept.
_MAGNITUDE, _SIGN, _HALF = b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x40"
_NO_LOGPROB = 255


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
    """Packs log-probs, rounded to 16 bits of mantissa; packing what was unpacked gives the same bytes.

    What is no log-prob (NaN, infinite, above 0) is packed too, as a mark that `unpack_logprobs` refuses: whoever reads
    a rollout judges it.
    """
    count = len(logprobs)
    if count and (max(logprobs) > 0 or not math.isfinite(sum(logprobs))):
        logprobs = [_marked(value) for value in logprobs]
    bits = _as_integer(array("f", logprobs)) & _repeated(_MAGNITUDE, count)
    # Neither step reaches into the next number: the sign's place is empty, and takes the carry and the shift.
    rounded = ((bits + _repeated(_HALF, count)) << 1).to_bytes(4 * count + 1, "big")[1:]
    return rounded[1::4] + rounded[2::4] + compress(rounded[0::4])


def unpack_logprobs(data: bytes, count: int) -> tuple[float, ...]:
    """`count` log-probs. Raises Rejected `logprobs` for another number of them, or for what is no log-prob."""
    try:
        exponents = decompress(data[2 * count :], count)
    except (IntegrityError, Rejected) as error:
        raise Rejected("logprobs", f"not {count} packed log-probs: {error}") from None
    if len(exponents) != count:
        raise Rejected("logprobs", f"{len(exponents)} packed log-probs for {count} sampled tokens")
    if _NO_LOGPROB in exponents:
        raise Rejected("logprobs", "log-probs must be finite and not above 0")
    planes = bytearray(4 * count)
    planes[0::4], planes[1::4], planes[2::4] = exponents, data[:count], data[count : 2 * count]
    bits = (int.from_bytes(planes, "big") >> 1) | _repeated(_SIGN, count)
    values = array("f", bits.to_bytes(4 * count, "big"))
    return tuple(_swapped(values))


def prompt_digest(token_ids: Sequence[int]) -> bytes:
    """What a ticket and a rollout name a prompt by. Raises OverflowError for ids that are not of 32 bits."""
    return hashlib.sha256(_swapped(array("I", token_ids))).digest()[:_DIGEST_BYTES]


def _marked(value: float) -> float:
    """The value as it travels. Of the many NaNs, the one that is left stays a NaN when it is rounded."""
    if not -math.inf < value <= ABOVE_ZERO:
        return math.nan
    return min(value, 0.0)


def _as_integer(values: array[float]) -> int:
    return int.from_bytes(_swapped(values), "big")


def _repeated(pattern: bytes, count: int) -> int:
    return int.from_bytes(pattern * count, "big")


def _swapped(values: array[Number]) -> array[Number]:
    """From this machine's order of bytes to big-endian, or back."""
    if sys.byteorder == "little":
        values.byteswap()
    return values
