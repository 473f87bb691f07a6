"""How a rollout's bytes travel in a stream entry: compressed where that helps, checked by SHA-256. Knows no broker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import zstandard

from longshore.errors import IntegrityError, Rejected

MAX_BYTES = 64 * 1024 * 1024
PLAIN = "plain"
ZSTD = "zstd"
# Below this the frame's own bytes eat the gain.
_MIN_COMPRESSED = 256
_LEVEL = 3


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
    if len(payload) >= _MIN_COMPRESSED:
        data = zstandard.ZstdCompressor(level=_LEVEL).compress(payload)
        if len(data) < 0.95 * len(payload):
            return Packed(ZSTD, data, sha256)
    return Packed(PLAIN, payload, sha256)


def decode(packed: Packed) -> bytes:
    """The payload again.

    Raises:
        Rejected: `codec` or `oversized`.
        IntegrityError: the bytes are not those that were sent.
    """
    if packed.codec not in (PLAIN, ZSTD):
        raise Rejected("codec", f"unknown codec {packed.codec!r}")
    payload = _unpack(packed.data) if packed.codec == ZSTD else packed.data
    if hashlib.sha256(payload).hexdigest() != packed.sha256:
        raise IntegrityError("a rollout's bytes do not match their SHA-256")
    return payload


def _unpack(data: bytes) -> bytes:
    try:
        # The declared size is checked first: the library would allocate whatever a frame declares.
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= MAX_BYTES:
            raise Rejected("oversized", f"a compressed rollout declares {size} bytes, at most {MAX_BYTES} are allowed")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError:
        raise IntegrityError("a compressed rollout is damaged") from None
