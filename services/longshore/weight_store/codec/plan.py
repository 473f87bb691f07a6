"""Which elements the sparse delta codes, in which order: cut into sections and pieces, the same at both ends.

All changed tensors of a dtype are one sequence of elements, rows left out in which nothing changed. It is cut evenly
into sections, each coded by itself, and a section into pieces of one tensor, each with its own density of changes.
A segment is a run of a piece that lies together in memory.
"""

from __future__ import annotations

import itertools
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
class Sparse:
    """One tensor that the sparse delta codes."""

    tensor: int
    elements: int
    # Of each row, whether anything in it changed; None: all rows are coded.
    rows: Flags | None


@dataclass(frozen=True)
class Section:
    """Columns of its segments, in order.

    Example: tensor=[0, 0], start=[0, 262144], count=[262144, 5], piece=[0, 1], pieces=2
    """

    tensor: Ints
    # First element, counted in the tensor.
    start: Ints
    count: Ints
    # Counted from the section's first.
    piece: Ints
    pieces: int

    @property
    def elements(self) -> int:
        return int(self.count.sum())


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows of a tensor and elements in one; what has short rows, or one dimension, is one row."""
    elements = math.prod(shape)
    width = math.prod(shape[1:])
    return (shape[0], width) if len(shape) > 1 and width >= 32 else (1, elements)


def sections(tensors: Sequence[Sparse]) -> list[Section]:
    """The plan for tensors of one dtype, in the layout's order."""
    runs = [_runs(tensor) for tensor in tensors]
    if not runs:
        return []
    tensor, start, count = (np.concatenate(column) for column in zip(*runs, strict=True))
    # Where each run starts in the sequence of all coded elements.
    at = np.cumsum(count) - count
    total = int(count.sum())
    if not total:
        return []
    parts = max(1, round(total / SECTION))
    borders = np.arange(parts + 1, dtype=np.int64) * total // parts
    firsts = at[np.flatnonzero(np.diff(tensor, prepend=-1))]
    ends = np.append(firsts[1:], total)
    pieces = np.unique(
        np.concatenate([borders[:-1], *(np.arange(low, high, PIECE) for low, high in zip(firsts, ends, strict=True))])
    )
    cuts = np.unique(np.concatenate([at[count > 0], pieces]))
    lengths = np.diff(cuts, append=total)
    run = np.searchsorted(at + count, cuts, side="right")
    piece = np.searchsorted(pieces, cuts, side="right") - 1
    starts = start[run] + cuts - at[run]
    made = []
    for first, last in itertools.pairwise(np.searchsorted(cuts, borders).tolist()):
        part = slice(first, last)
        own = piece[part] - piece[first]
        made.append(Section(tensor[run[part]], starts[part], lengths[part], own, int(own[-1]) + 1))
    return made


def _runs(tensor: Sparse) -> tuple[Ints, Ints, Ints]:
    """Tensor, first element and length of the runs of rows that are coded."""
    if tensor.rows is None:
        starts, ends = np.zeros(1, np.int64), np.full(1, tensor.elements, np.int64)
    else:
        edges = np.flatnonzero(np.diff(tensor.rows, prepend=False, append=False))
        width = tensor.elements // len(tensor.rows)
        starts, ends = edges[0::2] * width, edges[1::2] * width
    return np.full(len(starts), tensor.tensor, np.int64), starts, ends - starts
