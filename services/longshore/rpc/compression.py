"""zstd with contexts that are used again: making one costs more than packing a small rollout with it.

Knows nothing of what it packs.
"""

from __future__ import annotations

import threading

import zstandard

from longshore.errors import IntegrityError, Rejected

# Rollouts are mostly numbers, which higher levels pack no better.
_LEVEL = 1


class _Contexts(threading.local):
    """A context serves one call at a time: each thread has its own."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(data: bytes) -> bytes:
    """A zstd frame that states its content's size."""
    return _contexts.compressor.compress(data)


def decompress(frame: bytes, max_bytes: int) -> bytes:
    """The content of one frame.

    Raises:
        Rejected: `oversized`: it states no size, or one above `max_bytes`.
        IntegrityError: it is damaged, or something follows it.
    """
    try:
        # The stated size is checked first: the library would allocate whatever a frame states.
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= max_bytes:
            raise Rejected("oversized", f"a compressed part states {size} bytes, at most {max_bytes} are allowed")
        content = _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        raise IntegrityError("a compressed part is damaged") from None
    if len(content) != size:
        raise IntegrityError("a compressed part is not as long as it states")
    return content
