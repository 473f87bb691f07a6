"""How a rollout's bytes travel in a stream entry: compressed where that helps, checked by XXH3. Knows no broker."""

from __future__ import annotations

from typing import NamedTuple

import xxhash

from longshore.errors import IntegrityError, Rejected
from longshore.rpc.compression import compress, decompress

MAX_BYTES = 64 * 1024 * 1024
PLAIN = "plain"
ZSTD = "zstd"
# Below this the frame's own bytes eat the gain.
_MIN_COMPRESSED = 256
# Above this one byte in so many is tried first. What a rollout holds most of is packed already, by columns. An odd
# step meets every byte of the numbers in a column.
_MIN_TRIED = 4096
_TRIED_STEP = 17
# Unpacking must be worth its while.
_MIN_GAIN = 0.03


class Packed(NamedTuple):
    """A payload as it travels. `digest`, of the payload before packing, is what makes two deliveries the same.

    XXH3 (128 bits) finds accidents, at a twentieth of SHA-256's time. It is not meant for forgeries: who can write to
    the queue can write its digest too.
    """

    codec: str
    data: bytes
    digest: str


def encode(payload: bytes) -> Packed:
    """Packs a payload. Raises Rejected `oversized` above MAX_BYTES."""
    if len(payload) > MAX_BYTES:
        raise Rejected("oversized", f"the rollout has {len(payload)} bytes, at most {MAX_BYTES} are allowed")
    digest = xxhash.xxh3_128_hexdigest(payload)
    if len(payload) >= _MIN_COMPRESSED and (len(payload) < _MIN_TRIED or _packs(payload[::_TRIED_STEP])):
        data = compress(payload)
        if len(data) <= (1 - _MIN_GAIN) * len(payload):
            return Packed(ZSTD, data, digest)
    return Packed(PLAIN, payload, digest)


def _packs(sample: bytes) -> bool:
    return len(compress(sample)) <= (1 - _MIN_GAIN) * len(sample)


def decode(packed: Packed) -> bytes:
    """The payload again.

    Raises:
        Rejected: `codec` or `oversized`.
        IntegrityError: the bytes are not those that were sent.
    """
    if packed.codec not in (PLAIN, ZSTD):
        raise Rejected("codec", f"unknown codec {packed.codec!r}")
    payload = decompress(packed.data, MAX_BYTES) if packed.codec == ZSTD else packed.data
    if xxhash.xxh3_128_hexdigest(payload) != packed.digest:
        raise IntegrityError("a rollout's bytes do not match their digest")
    return payload
