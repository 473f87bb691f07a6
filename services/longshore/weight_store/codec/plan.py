"""Which elements the sparse delta codes, in which order: cut into pieces and sections, the same at both ends.

A tensor's elements, without the rows in which nothing changed, are cut into pieces, each with its own density of
changes. A segment is a run of a piece that lies together in memory. Pieces of consecutive tensors of a dtype make up
a section, which is coded by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SECTION = 1 << 24
PIECE = 1 << 18

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """One tensor that the sparse delta codes; its segments in order.

    Example: start=[0, 262144], count=[262144, 5], piece=[0, 1], pieces=2
    """

    tensor: int
    # Of each row, whether anything in it changed; None: all rows are coded.
    rows: Flags | None
    # First element of each segment, and how many there are.
    start: Ints
    count: Ints
    # Each segment's piece.
    piece: Ints
    # Elements of each piece, and of all.
    sizes: Ints
    elements: int


@dataclass(frozen=True)
class Part:
    """Pieces of one tensor in a section, and their segments."""

    cut: Cut
    pieces: slice
    segments: slice


# Parts of different tensors, in order.
Section = list[Part]


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows of a tensor and elements in one; what has short rows, or one dimension, is one row."""
    width = math.prod(shape[1:])
    return (shape[0], width) if len(shape) > 1 and width >= 32 else (1, math.prod(shape))


def cut(tensor: int, elements: int, rows: Flags | None) -> Cut:
    """The tensor of that number in the layout."""
    if rows is None:
        pieces = np.arange(0, elements, PIECE)
        sizes = np.minimum(PIECE, elements - pieces)
        return Cut(tensor, None, pieces, sizes, np.arange(len(pieces)), sizes, elements)
    edges = np.flatnonzero(np.diff(rows, prepend=False, append=False))
    width = elements // len(rows)
    starts, lengths = edges[0::2] * width, (edges[1::2] - edges[0::2]) * width
    # Where each run of coded rows starts among all coded elements.
    at = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    pieces = np.arange(0, total, PIECE)
    cuts = np.union1d(at, pieces)
    run = np.searchsorted(at, cuts, side="right") - 1
    piece = np.searchsorted(pieces, cuts, side="right") - 1
    counts = np.diff(cuts, append=total)
    sizes = np.minimum(PIECE, total - pieces)
    return Cut(tensor, rows, starts[run] + cuts - at[run], counts, piece, sizes, total)


class Sectioner:
    """Puts pieces of tensors of one dtype, in the layout's order, into sections of SECTION elements or a piece more.

    So a section is complete, and can be coded, before later tensors are looked at.
    """

    def __init__(self) -> None:
        self.open: Section = []
        self._size = 0

    def add(self, own: Cut) -> list[Section]:
        """The sections that the tensor completes."""
        complete = []
        low = 0
        for piece, size in enumerate(own.sizes.tolist()):
            self._size += size
            if self._size >= SECTION:
                complete.append([*self.open, _part(own, low, piece + 1)])
                self.open, self._size = [], 0
                low = piece + 1
        if low < len(own.sizes):
            self.open.append(_part(own, low, len(own.sizes)))
        return complete

    def finish(self) -> list[Section]:
        """The last section, if there is anything in it."""
        last, self.open, self._size = self.open, [], 0
        return [last] if last else []


def elements(section: Section) -> int:
    return sum(int(part.cut.sizes[part.pieces].sum()) for part in section)


def _part(own: Cut, low: int, high: int) -> Part:
    """Its pieces from low to high."""
    if own.rows is None:
        return Part(own, slice(low, high), slice(low, high))
    first, last = np.searchsorted(own.piece, [low, high]).tolist()
    return Part(own, slice(low, high), slice(first, last))
