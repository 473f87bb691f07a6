"""Tensors of which most elements change, or that have no base: blocks of byte planes, compressed where that pays.

A block is BLOCK elements, each an integer: its bits with the sign moved to the lowest place, so that the highest byte
is the exponent; or the zigzag of its signed step from the base. A block's bytes are written plane by plane, the
lowest first, each as it is or as a zstd frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from longshore.errors import IntegrityError
from longshore.weight_store.codec import frame
from longshore.weight_store.codec.kernel import Bytes, Words, words

BLOCK = 1 << 20
LEVEL = 1

# A block's kind: a bit a plane that is compressed, and whether it is of steps.
_STEPS = 0x80

# A block in a payload: its kind, and its planes.
Stored = tuple[int, list[memoryview]]


@dataclass(frozen=True)
class Block:
    kind: int
    parts: Sequence[bytes | memoryview]

    @property
    def size(self) -> int:
        return sum(len(part) for part in self.parts)

    def fields(self) -> list[npt.NDArray[np.generic]]:
        """Kind, and the lengths of the planes that are compressed."""
        sizes = [len(part) for plane, part in enumerate(self.parts) if self.kind >> plane & 1]
        return [np.array([self.kind], np.uint8), np.array(sizes, np.uint32)]


def encode(width: int, new: Bytes, old: Bytes | None) -> list[Block]:
    """The smaller of both kinds, block by block; without a base there is one."""
    made = []
    for first in range(0, len(new), BLOCK * width):
        part = slice(first, first + BLOCK * width)
        values = words(width, new[part])
        block = _block(0, _rotated(values))
        if old is not None:
            steps = _block(_STEPS, _steps(words(width, old[part]), values))
            block = min(block, steps, key=lambda own: own.size)
        made.append(block)
    return made


def read(fields: frame.Fields, width: int, size: int) -> list[Stored]:
    """A tensor's blocks, of `size` bytes in all. Raises IntegrityError."""
    read = []
    for first in range(0, size, BLOCK * width):
        count = min(size - first, BLOCK * width) // width
        kind = int(fields.take(1)[0])
        flags = [kind >> plane & 1 for plane in range(width)]
        sizes = iter(fields.take(sum(flags), np.uint32))
        read.append((kind, [fields.part(int(next(sizes)) if flag else count) for flag in flags]))
    return read


def decode(name: str, width: int, blocks: Sequence[Stored], new: Bytes, old: Bytes | None) -> None:
    """Fills `new`; blocks of steps need `old`. Raises IntegrityError."""
    for part, (kind, parts) in zip(_parts(width, len(new)), blocks, strict=True):
        out = new[part]
        planes = out.reshape(-1, width)
        for plane, stored in enumerate(parts):
            what = f"tensor {name}: plane {plane} of a block"
            data = frame.decompress(stored, what, len(planes)) if kind >> plane & 1 else stored
            planes[:, plane] = np.frombuffer(data, np.uint8)
        values = words(width, out)
        if not kind & _STEPS:
            values[:] = _unrotated(values)
        elif old is not None:
            values[:] = _stepped(words(width, old[part]), values)
        else:
            raise IntegrityError(f"tensor {name}: a block of steps, yet there is no base")


def _parts(width: int, size: int) -> Iterator[slice]:
    for first in range(0, size, BLOCK * width):
        yield slice(first, min(size, first + BLOCK * width))


def _block(kind: int, numbers: Words) -> Block:
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    parts: list[bytes | memoryview] = []
    for plane in range(numbers.dtype.itemsize):
        data = np.ascontiguousarray(numbers.view(np.uint8).reshape(len(numbers), -1)[:, plane])
        packed = compressor.compress(data.data)
        # A length costs four bytes.
        small = len(packed) + 4 < len(data)
        kind |= small << plane
        parts.append(packed if small else data.data)
    return Block(kind, parts)


def _rotated(values: Words) -> Words:
    return (values << 1) | (values >> (8 * values.itemsize - 1))


def _unrotated(values: Words) -> Words:
    return (values >> 1) | (values << (8 * values.itemsize - 1))


def _ordered(values: Words) -> Words:
    """Values on a line in the order of the floats, modulo its length; the same turns them back."""
    top = 8 * values.itemsize - 1
    ordered: Words = values ^ ((values >> top) * values.dtype.type((1 << top) - 1))
    return ordered


def _steps(old: Words, new: Words) -> Words:
    signed = np.int16 if new.itemsize == 2 else np.int32
    step: Words = (_ordered(new) - _ordered(old)).view(signed)
    return ((step << 1) ^ (step >> (8 * new.itemsize - 1))).view(new.dtype)


def _stepped(old: Words, zigzag: Words) -> Words:
    one = zigzag.dtype.type(1)
    return _ordered(_ordered(old) + ((zigzag >> one) ^ (0 - (zigzag & one))))
