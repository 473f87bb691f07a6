"""The delta of one version's tensors from another's, lossless."""

from __future__ import annotations

from collections.abc import Sequence

import blake3
import numpy as np

from longshore.errors import IntegrityError
from longshore.weight_store.codec import frame
from longshore.weight_store.payload import Tensor, TensorInfo

CODEC = "longshore-delta/1"

_MAGIC = b"LSD\x01"
_SAME, _XOR, _RAW = 0, 1, 2


def encode(base: Sequence[Tensor], new: Sequence[Tensor], threads: int = 1) -> bytes:
    """The payload from which `new` is decoded where `base` is.

    Raises:
        ValueError: the two differ in order, names, dtypes or shapes, or bytes do not fit a shape.
    """
    if frame.layout_digest(base) != frame.layout_digest(new):
        raise ValueError("base and new tensors differ in order, names, dtypes or shapes: publish a full encoding")
    modes: list[int] = []
    parts: list[bytes | memoryview] = []
    for old, own in zip(base, new, strict=True):
        before, after = frame.bytes_of(old), frame.bytes_of(own)
        if np.array_equal(before, after):
            modes.append(_SAME)
            parts.append(b"")
            continue
        packed = frame.compress(np.bitwise_xor(before, after))
        small = len(packed) < len(after)
        modes.append(_XOR if small else _RAW)
        parts.append(packed if small else after.data)
    return frame.pack(_MAGIC, frame.layout_digest(new), modes, parts)


def decode(
    payload: bytes | memoryview,
    base: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    threads: int = 1,
    verify: bool = True,
    base_infos: Sequence[TensorInfo] | None = None,
) -> list[Tensor]:
    """The tensors that `infos` describe: of those that did not change, base's own objects.

    With `verify` every tensor's BLAKE3 is compared with its info: of a changed tensor that of its decoded bytes; of an
    unchanged one that of `base_infos`, for a caller that has proven the base against them, else that of base's bytes.

    Raises:
        IntegrityError: naming the first thing that is wrong.
        ValueError: base has another layout than `infos`.
    """
    if frame.layout_digest(base) != frame.layout_digest(infos):
        raise ValueError("base tensors and infos differ in order, names, dtypes or shapes")
    parts = frame.unpack(payload, _MAGIC, infos)
    decoded = []
    for index, (info, old, (mode, part)) in enumerate(zip(infos, base, parts, strict=True)):
        own = _decode_one(info, old, mode, part)
        if verify:
            proven = base_infos[index].blake3 if own is old and base_infos is not None else None
            if (proven or blake3.blake3(own.data).digest()) != info.blake3:
                raise IntegrityError(f"tensor {info.name} does not match its checksum in the manifest")
        decoded.append(own)
    return decoded


def _decode_one(info: TensorInfo, old: Tensor, mode: int, part: memoryview) -> Tensor:
    if mode == _SAME:
        if part:
            raise IntegrityError(f"tensor {info.name}: unchanged, yet the payload has {len(part)} bytes for it")
        return old
    if mode == _XOR:
        bits = np.frombuffer(frame.decompress(info.name, part, info.num_bytes), np.uint8)
        return frame.tensor_of(info, np.bitwise_xor(bits, frame.bytes_of(old)))
    if mode == _RAW:
        if len(part) != info.num_bytes:
            raise IntegrityError(f"tensor {info.name}: {len(part)} bytes in the payload, not {info.num_bytes}")
        return frame.tensor_of(info, np.frombuffer(part, np.uint8).copy())
    raise IntegrityError(f"tensor {info.name}: the payload has mode {mode} for it, which this version does not know")
