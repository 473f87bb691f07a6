"""What both encodings share: a payload's header, the layout that it is bound to, and bounded decompression.

magic 4 bytes | layout digest 32 bytes | one mode byte a tensor | one u64 a tensor, the length of its part | parts
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import zstandard

from longshore.errors import IntegrityError
from longshore.weight_store.payload import DTYPES, Tensor, TensorInfo, num_bytes

Bytes = npt.NDArray[np.uint8]


def layout_digest(tensors: Sequence[Tensor | TensorInfo]) -> bytes:
    """SHA-256 over order, names, dtypes and shapes, as compact JSON: the manifest's own."""
    rows = [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).digest()


def bytes_of(tensor: Tensor) -> Bytes:
    """A tensor's bytes without a copy. Raises ValueError when they do not fit its shape and dtype."""
    data = np.frombuffer(tensor.data, np.uint8)
    expected = num_bytes(tensor.dtype, tensor.shape)
    if data.size != expected:
        raise ValueError(f"tensor {tensor.name}: {data.size} bytes, its shape and dtype need {expected}")
    return data


def tensor_of(info: TensorInfo, data: Bytes) -> Tensor:
    """A tensor over an array that nobody writes to any more."""
    return Tensor(info.name, info.dtype, info.shape, cast("bytes", data.data.toreadonly()))


def item_bytes(dtype: str) -> int:
    return DTYPES[dtype][1]


def pack(magic: bytes, layout: bytes, modes: Sequence[int], parts: Sequence[bytes | memoryview]) -> bytes:
    lengths = struct.pack(f"<{len(parts)}Q", *(len(part) for part in parts))
    return b"".join([magic, layout, bytes(modes), lengths, *parts])


def unpack(payload: bytes | memoryview, magic: bytes, infos: Sequence[TensorInfo]) -> list[tuple[int, memoryview]]:
    """Mode and part of every tensor.

    Raises:
        IntegrityError: another format, other tensors than `infos`, or parts that are not the payload's bytes.
    """
    view = memoryview(payload).cast("B")
    if bytes(view[:4]) != magic:
        raise IntegrityError(f"the payload is not of format {magic!r}: it starts with {bytes(view[:4])!r}")
    if bytes(view[4:36]) != layout_digest(infos):
        raise IntegrityError("the payload was made for other tensors than the manifest's: its layout digest differs")
    start = 36 + 9 * len(infos)
    if len(view) < start:
        raise IntegrityError("the payload is truncated")
    modes = bytes(view[36 : 36 + len(infos)])
    lengths = struct.unpack(f"<{len(infos)}Q", view[36 + len(infos) : start])
    if start + sum(lengths) != len(view):
        raise IntegrityError(f"the payload has {len(view)} bytes, which its parts do not add up to")
    parts = []
    for mode, length in zip(modes, lengths, strict=True):
        parts.append((mode, view[start : start + length]))
        start += length
    return parts


def compress(data: Bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data.data)


def decompress(name: str, part: memoryview, size: int) -> bytes:
    """Exactly `size` bytes. Raises IntegrityError; never allocates more than `size`."""
    try:
        frame = zstandard.get_frame_parameters(part)
        if frame.content_size != size:
            raise IntegrityError(f"tensor {name}: its part of the payload says {frame.content_size} bytes, not {size}")
        data = zstandard.ZstdDecompressor().decompress(part, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"tensor {name}: its part of the payload cannot be decompressed: {error}") from None
    if len(data) != size:
        raise IntegrityError(f"tensor {name}: its part of the payload has {len(data)} bytes, not {size}")
    return data
