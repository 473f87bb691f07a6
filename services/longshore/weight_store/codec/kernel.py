"""The codecs' inner loops, as what they take and give; in C where that was built, else in numpy.

Both kernels give the same bytes. What the streams mean is told in codes.py and kernel.c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from longshore.weight_store.codec.codes import EXPONENTS, Model
from longshore.weight_store.codec.plan import Cut, Flags, Section

Bytes = npt.NDArray[np.uint8]
# Elements as unsigned numbers of 16 or 32 bits.
Words = npt.NDArray[Any]
Rows = npt.NDArray[np.void]
Bits = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]


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
class Scan:
    """What changed in some pieces."""

    # Of EVENT, in the elements' order.
    events: Rows
    # [pieces] of TABLE.
    tables: Rows


@dataclass(frozen=True)
class Whole:
    """What changed in a tensor."""

    scan: Scan
    # A bit an element, the lowest first, and a word of zeros at the end.
    changed: Bits
    # Of each row, whether anything in it changed.
    rows: Flags


class Decoder(Protocol):
    """One section's changes."""

    def fill(self, number: int) -> None:
        """Fills the section's part of that number in its tensor; from the first part to the last."""


class Kernel(Protocol):
    """Tensors are arrays of bytes."""

    # Changes of a tensor beyond which coding each would take this kernel too long; None: there is no such number.
    patience: int | None

    def scan(self, form: Format, old: Bytes, new: Bytes, row: int, room: int) -> Whole | None:
        """A tensor's changes, by pieces of plan.PIECE; its rows have `row` elements. None: more than `room` changes."""

    def scan_rows(self, form: Format, cut: Cut, changed: Bits, old: Bytes, new: Bytes, count: int) -> Scan:
        """The `count` changes of a tensor of which some rows are left out."""

    def emit(self, scans: Sequence[Scan], model: Model, room: int) -> list[bytes] | None:
        """A section's two streams, of its pieces' scans; None when one would be longer than `room`."""

    def decoder(
        self,
        form: Format,
        section: Section,
        model: Model,
        streams: Sequence[memoryview],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> Decoder | None:
        """From a section's `old` tensors to `new` ones; None when the streams are not as long as what was read."""

    def add_product(self, form: Format, old: Bytes, down: Floats, up: Floats, new: Bytes) -> None:
        """Fills `new` with `old` + up x down, rounded as product.h tells, bit for bit.

        Args:
            old, new: [rows, columns] of the format.
            down: [rank, columns], contiguous; a rank of at least 1.
            up: [rows, rank], contiguous.
        """
