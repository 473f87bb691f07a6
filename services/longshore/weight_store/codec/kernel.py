"""The sparse delta's inner loops, as what they take and give; in C where that was built, else in numpy.

Both kernels give the same bytes. What the streams mean is told in codes.py and kernel.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from longshore.weight_store.codec.codes import EXPONENTS, Codes, Model
from longshore.weight_store.codec.plan import Cut, Part

Bytes = npt.NDArray[np.uint8]
# Elements as unsigned numbers of 16 or 32 bits.
Words = npt.NDArray[Any]
Rows = npt.NDArray[np.void]


def words(width: int, data: Bytes) -> Words:
    """The same memory as unsigned numbers of that many bytes."""
    return data.view(np.uint16 if width == 2 else np.uint32)


# One change: elements of the context since its last change in the piece (or the piece's start);
# |new| - |old| as integers; the old value's exponent, and FLIP where the sign changed.
EVENT = np.dtype([("gap", "<u4"), ("step", "<i4"), ("exponent", "<u4")])
FLIP = EXPONENTS
_COLUMNS = ("changed", "excess", "elements", "tail")
# A piece's sums by exponent: changes; sizes of their steps less one, and two more for each that changed sign; elements;
# and those after the last change.
TABLE = np.dtype([(name, size, EXPONENTS) for name, size in zip(_COLUMNS, ("<u8", "<u8", "<u4", "<u4"), strict=True)])


@dataclass(frozen=True)
class Format:
    """Of a dtype: bytes an element, and where the exponent lies in it."""

    width: int
    shift: int
    mask: int


FORMATS = {"bfloat16": Format(2, 7, 0xFF), "float16": Format(2, 10, 0x1F), "float32": Format(4, 23, 0xFF)}


@dataclass(frozen=True)
class Changes:
    """Where two tensors differ."""

    # A bit an element, the lowest first, and a word of zeros at the end.
    bits: npt.NDArray[np.uint64]
    # The new values there, in order.
    values: Bytes
    # [EXPONENTS]: how many changed, by the old value's exponent.
    counts: npt.NDArray[np.int64]
    total: int


@dataclass(frozen=True)
class Scan:
    """What changed in some pieces."""

    # Of EVENT, in the elements' order.
    events: Rows
    # [pieces] of TABLE.
    tables: Rows


class Decoder(Protocol):
    """One section's changes."""

    def fill(self, form: Format, part: Part, classes: Codes, old: Bytes, new: Bytes) -> None:
        """Fills the section's next part of a tensor. `classes`: of the part's pieces."""


class Kernel(Protocol):
    """Tensors are arrays of bytes."""

    # Changes of a tensor beyond which coding each would take this kernel too long; None: there is no such number.
    patience: int | None

    def compare(self, form: Format, old: Bytes, new: Bytes) -> Changes:
        """Both hold as many elements."""

    def scan(self, form: Format, cut: Cut, changes: Changes, old: Bytes) -> Scan:
        """A tensor's changes."""

    def emit(self, scans: Sequence[Scan], model: Model, room: int) -> list[bytes] | None:
        """A section's two streams, of its pieces' scans; None when one would be longer than `room`."""

    def decoder(self, form: Format, model: Model, elements: int, streams: Sequence[memoryview]) -> Decoder | None:
        """Of a section of so many elements; None when the stream of bits is not as long as what was read."""
