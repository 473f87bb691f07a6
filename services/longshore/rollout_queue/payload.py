"""How a rollout's bytes travel in a stream entry: compressed where that helps, checked by SHA-256. Knows no broker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from longshore.errors import IntegrityError, Rejected
from longshore.rpc.compression import compress, decompress

MAX_BYTES = 64 * 1024 * 1024
PLAIN = "plain"
ZSTD = "zstd"
# Below this the frame's own bytes eat the gain.
_MIN_COMPRESSED = 256
# Above this one byte in so many is tried first. What a rollout holds most of is packed already, by columns.
_MIN_TRIED = 4096
_TRIED_STEP = 8
# Unpacking must be worth its while.
_MIN_GAIN = 0.03


@dataclass(frozen=True)
class Packed:
    """A payload as it travels. `sha256`, of the payload before packing, is what makes two deliveries the same."""

    codec: str
    data: bytes
    sha256: str


def encode(payload: bytes) -> Packed:
    """Packs a payload. Raises Rejected `oversized` above MAX_BYTES."""
    if len(payload) > MAX_BYTES:
        raise Rejected("oversized", f"the rollout has {len(payload)} bytes, at most {MAX_BYTES} are allowed")
    sha256 = hashlib.sha256(payload).hexdigest()
    if len(payload) >= _MIN_COMPRESSED and (len(payload) < _MIN_TRIED or _packs(payload[::_TRIED_STEP])):
        data = compress(payload)
        if len(data) <= (1 - _MIN_GAIN) * len(payload):
            return Packed(ZSTD, data, sha256)
    return Packed(PLAIN, payload, sha256)


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
    if hashlib.sha256(payload).hexdigest() != packed.sha256:
        raise IntegrityError("a rollout's bytes do not match their SHA-256")
    return payload
