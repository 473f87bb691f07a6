"""The full encoding of one version's tensors, lossless: byte planes, compressed where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import blake3
import numpy as np

from longshore.errors import IntegrityError
from longshore.weight_store.codec import frame
from longshore.weight_store.payload import Tensor, TensorInfo

CODEC = "longshore-planes/1"

_MAGIC = b"LSP\x01"
_RAW, _PLANES = 0, 1


def encode(tensors: Sequence[Tensor], threads: int = 1) -> bytes:
    """The payload from which the tensors are decoded. Raises ValueError: bytes do not fit a shape."""
    modes: list[int] = []
    parts: list[bytes | memoryview] = []
    for tensor in tensors:
        data = frame.bytes_of(tensor)
        packed = frame.compress(np.ascontiguousarray(data.reshape(-1, frame.item_bytes(tensor.dtype)).T).reshape(-1))
        small = len(packed) < len(data)
        modes.append(_PLANES if small else _RAW)
        parts.append(packed if small else data.data)
    return frame.pack(_MAGIC, frame.layout_digest(tensors), modes, parts)


def decode(
    payload: bytes | memoryview, infos: Sequence[TensorInfo], threads: int = 1, verify: bool = True
) -> list[Tensor]:
    """The tensors that `infos` describe, with `verify` each checked against its BLAKE3.

    Raises:
        IntegrityError: naming the first thing that is wrong.
    """
    decoded = []
    for info, (mode, part) in zip(infos, frame.unpack(payload, _MAGIC, infos), strict=True):
        own = _decode_one(info, mode, part)
        if verify and blake3.blake3(own.data).digest() != info.blake3:
            raise IntegrityError(f"tensor {info.name} does not match its checksum in the manifest")
        decoded.append(own)
    return decoded


def _decode_one(info: TensorInfo, mode: int, part: memoryview) -> Tensor:
    if mode == _PLANES:
        flat = np.frombuffer(frame.decompress(info.name, part, info.num_bytes), np.uint8)
        return frame.tensor_of(info, np.ascontiguousarray(flat.reshape(frame.item_bytes(info.dtype), -1).T).reshape(-1))
    if mode == _RAW:
        if len(part) != info.num_bytes:
            raise IntegrityError(f"tensor {info.name}: {len(part)} bytes in the payload, not {info.num_bytes}")
        return frame.tensor_of(info, np.frombuffer(part, np.uint8).copy())
    raise IntegrityError(f"tensor {info.name}: the payload has mode {mode} for it, which this version does not know")
