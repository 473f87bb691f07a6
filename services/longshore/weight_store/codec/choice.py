"""Which way the delta codes a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longshore.weight_store.codec import blocks
from longshore.weight_store.codec.kernel import FORMATS, Bytes, Format, Kernel, Scan, Words, words
from longshore.weight_store.codec.plan import Cut, cut, rows_of
from longshore.weight_store.payload import Tensor

SAME, SPARSE, SPARSE_ROWS, BLOCKS = 0, 1, 2, 3

# Where more than one element in so many changed, a sample tells which of both is smaller.
_SURELY_SPARSE = 5
_SAMPLE_RUNS, _SAMPLE_RUN = 32, 512
# Coding change by change takes some ten times as long as blocks where most elements changed: it must save that share.
_WORTH_IT = 0.75


@dataclass(frozen=True)
class Choice:
    mode: int
    # Of a sparse one.
    cut: Cut | None = None
    scan: Scan | None = None


def choose(kernel: Kernel, index: int, tensor: Tensor, old: Bytes, new: Bytes) -> Choice:
    """For the tensor with that number in the layout."""
    form = FORMATS[tensor.dtype]
    rows, width = rows_of(tensor.shape)
    elements = rows * width
    room = elements // _SURELY_SPARSE + 1
    whole = kernel.scan(form, old, new, width, room if kernel.patience is None else min(room, kernel.patience))
    if whole is None:
        if kernel.patience is not None and kernel.patience < room:
            return Choice(BLOCKS)
        before, after = _sample(form, old), _sample(form, new)
        if _sparse_bits(form, before, after) > _WORTH_IT * 8 * _block_bytes(form, before, after):
            return Choice(BLOCKS)
        whole = kernel.scan(form, old, new, width, elements)
        assert whole is not None
    changes = len(whole.scan.events)
    if not changes:
        return Choice(SAME)
    if not _rows_pay(rows, int(np.count_nonzero(whole.rows)), changes):
        return Choice(SPARSE, cut(index, elements, None), whole.scan)
    own = cut(index, elements, whole.rows)
    return Choice(SPARSE_ROWS, own, kernel.scan_rows(form, own, whole.changed, old, new, changes))


def _rows_pay(rows: int, alive: int, changes: int) -> bool:
    """Whether leaving out rows in which nothing changed saves more than saying which they are."""
    if rows == alive:
        return False
    share = alive / rows
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    # In bits, and more than the fields' overhead.
    return changes * -math.log2(share) > rows * entropy + 256


def _sample(form: Format, data: Bytes) -> Words:
    values = words(form.width, data)
    if len(values) <= _SAMPLE_RUNS * _SAMPLE_RUN:
        return values
    starts = np.linspace(0, len(values) - _SAMPLE_RUN, _SAMPLE_RUNS).astype(np.int64)
    sample: Words = values[(starts[:, None] + np.arange(_SAMPLE_RUN)).reshape(-1)]
    return sample


def _block_bytes(form: Format, before: Words, after: Words) -> int:
    return sum(block.size for block in blocks.encode(form.width, after.view(np.uint8), before.view(np.uint8)))


def _sparse_bits(form: Format, before: Words, after: Words) -> float:
    """About: the entropy of the steps' sizes in octaves, by exponent, and the bits below."""
    top = 8 * form.width - 1
    low = before.dtype.type((1 << top) - 1)
    step = np.abs((after & low).astype(np.int64) - (before & low).astype(np.int64)) + ((after ^ before) >> top)
    octaves = np.frexp(step.astype(np.float64))[1]
    exponents = (before >> form.shift) & form.mask
    pairs, counts = np.unique(exponents.astype(np.int64) * 64 + octaves, return_counts=True)
    whole = np.bincount(pairs >> 6, weights=counts)[pairs >> 6]
    changed = np.count_nonzero(step)
    return float((counts * np.log2(whole / counts)).sum() + np.maximum(octaves - 1, 0).sum() + changed)
