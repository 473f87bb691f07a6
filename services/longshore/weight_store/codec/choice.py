"""Which way the delta codes a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longshore.weight_store.codec import blocks
from longshore.weight_store.codec.kernel import FORMATS, Bytes, Changes, Format, Kernel, Scan, Words, words
from longshore.weight_store.codec.plan import Cut, Flags, cut, rows_of
from longshore.weight_store.payload import Tensor

SAME, SPARSE, SPARSE_ROWS, BLOCKS = 0, 1, 2, 3

# Where more elements changed than that, a sample tells which of both is smaller.
_SURELY_SPARSE = 0.2
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
    """For the tensor with that number in the layout; it is scanned while the processor's cache still holds it."""
    form = FORMATS[tensor.dtype]
    changes = kernel.compare(form, old, new)
    if not changes.total:
        return Choice(SAME)
    if kernel.patience is not None and changes.total > kernel.patience:
        return Choice(BLOCKS)
    rows, width = rows_of(tensor.shape)
    elements = rows * width
    if changes.total > _SURELY_SPARSE * elements:
        before, after = _sample(form, old), _sample(form, new)
        if _sparse_bits(form, before, after) > _WORTH_IT * 8 * _block_bytes(form, before, after):
            return Choice(BLOCKS)
    alive = _rows_that_changed(changes, rows, width)
    own = cut(index, elements, alive)
    return Choice(SPARSE if alive is None else SPARSE_ROWS, own, kernel.scan(form, own, changes, old))


def _rows_that_changed(changes: Changes, rows: int, width: int) -> Flags | None:
    """None unless leaving out the others saves more than saying which they are."""
    if rows == 1 or width % 8:
        return None
    alive = changes.bits.view(np.uint8)[: rows * width // 8].reshape(rows, width // 8).any(axis=1)
    share = np.count_nonzero(alive) / rows
    if share == 1:
        return None
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    # In bits, and more than the fields' overhead.
    saved = changes.total * -math.log2(share) - rows * entropy - 256
    return np.asarray(alive, np.bool_) if saved > 0 else None


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
