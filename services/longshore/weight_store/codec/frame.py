"""What the encodings' payloads share: the header that binds one to its tensors, and reading it with care.

    magic 4 bytes | layout digest 32 bytes | header's length u32 | header, zstd | parts, one after another

The header, unpacked, is a sequence of fields that each encoding defines; among them are the lengths of all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import blake3
import numpy as np
import numpy.typing as npt
import zstandard

from longshore.errors import IntegrityError
from longshore.weight_store.codec.kernel import Bytes
from longshore.weight_store.payload import Tensor, TensorInfo, layout_digest, num_bytes

_START = 40

T = TypeVar("T")
R = TypeVar("R")


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


def each(threads: int, do: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`do` of every item, in order, by that many threads."""
    if threads <= 1:
        return [do(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(do, items))


def verify_bytes(data: bytes | memoryview, info: TensorInfo) -> None:
    """Raises IntegrityError when a tensor's bytes do not match its checksum."""
    if blake3.blake3(data).digest() != info.blake3:
        raise IntegrityError(f"tensor {info.name} does not match its checksum in the manifest")


def verify(threads: int, tensors: Sequence[Tensor], infos: Sequence[TensorInfo]) -> None:
    """Raises IntegrityError for the first tensor that does not match its checksum."""
    each(threads, lambda own: verify_bytes(own[0].data, own[1]), zip(tensors, infos, strict=True))


def verify_unchanged(
    threads: int,
    unchanged: Sequence[int],
    base: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    base_infos: Sequence[TensorInfo] | None,
) -> None:
    """Of tensors that are base's own: `base_infos`, where the caller has proven the base against them, spares hashing.
    Raises IntegrityError."""
    own = [infos[index] for index in unchanged]
    if base_infos is None:
        verify(threads, [base[index] for index in unchanged], own)
        return
    for index, info in zip(unchanged, own, strict=True):
        if base_infos[index].blake3 != info.blake3:
            raise IntegrityError(f"tensor {info.name} does not match its checksum: the payload leaves it unchanged")


def pack(
    magic: bytes, layout: bytes, fields: Iterable[npt.NDArray[np.generic]], parts: Iterable[bytes | memoryview]
) -> bytes:
    """A payload; fields are arrays of little-endian numbers."""
    header = zstandard.ZstdCompressor(level=9).compress(b"".join(field.tobytes() for field in fields))
    return b"".join([magic, layout, len(header).to_bytes(4, "little"), header, *parts])


class Fields:
    """A payload's header, field by field, and then its parts."""

    def __init__(self, payload: bytes | memoryview, magic: bytes, infos: Sequence[TensorInfo]) -> None:
        """Raises IntegrityError: another format, other tensors than `infos`, or a header that cannot be read."""
        self._payload = memoryview(payload).cast("B")
        if bytes(self._payload[:4]) != magic:
            raise IntegrityError(f"the payload is not of format {magic!r}: it starts {bytes(self._payload[:4])!r}")
        if bytes(self._payload[4:36]) != layout_digest(infos):
            raise IntegrityError("the payload is for other tensors than the manifest's: its layout digest differs")
        length = int.from_bytes(self._payload[36:_START], "little")
        self._at = _START + length
        if self._at > len(self._payload):
            raise IntegrityError("the payload ends within its header")
        # More than any header of these tensors needs: codes of a section, a byte a piece, a bit a row, sizes of blocks.
        limit = 2**16 + 64 * len(infos) + sum(info.num_bytes for info in infos) // 256
        self._header = _decompressed(self._payload[_START : self._at], "the payload's header", limit)
        self._field = 0

    def take(self, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[np.int64]:
        """The next field's numbers."""
        end = self._field + count * np.dtype(dtype).itemsize
        if end > len(self._header):
            raise IntegrityError("the payload's header ends within a field")
        numbers = np.frombuffer(self._header, dtype, count, self._field)
        self._field = end
        return numbers.astype(np.int64)

    def part(self, size: int) -> memoryview:
        """The next part's bytes."""
        end = self._at + size
        if end > len(self._payload):
            raise IntegrityError("the payload ends within its parts")
        part = self._payload[self._at : end]
        self._at = end
        return part

    def finish(self) -> None:
        """Raises IntegrityError when anything is left over."""
        if self._field != len(self._header) or self._at != len(self._payload):
            raise IntegrityError("the payload goes on after its last field or part")


def decompress(part: memoryview, what: str, size: int) -> bytes:
    """Exactly `size` bytes. Raises IntegrityError; never allocates more than `size`."""
    data = _decompressed(part, what, size)
    if len(data) != size:
        raise IntegrityError(f"{what} has {len(data)} bytes when decompressed, not {size}")
    return data


def _decompressed(part: memoryview, what: str, limit: int) -> bytes:
    try:
        size = zstandard.get_frame_parameters(part).content_size
        if size > limit:
            raise IntegrityError(f"{what} says it has {size} bytes when decompressed; at most {limit} can be right")
        return zstandard.ZstdDecompressor().decompress(part, allow_extra_data=False) if size else b""
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what} cannot be decompressed: {error}") from None
