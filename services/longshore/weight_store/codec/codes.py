"""How the sparse delta writes each context: fitted to a section's counts, and packed into its header.

A context is (class of the piece, exponent of the old value). The receiver knows both. Within a context changes come at
random, nearly; so the gap between two, counted in elements of the context, is geometric:

- up to DENSE changes an element: Golomb's code (S. W. Golomb, "Run-length encodings", 1966), its divisor in quarter
  octaves;
- denser: a bit an element, by an adaptive binary range coder.

A step is the change of a value's bits as an integer, in sign-magnitude order. Where all of a context's steps are one up
or one down, it is one bit. Else the range coder's bins say whether it is such a step, and if not whether the sign
flipped, up or down, and how far in Elias' gamma code; its bins are shared by contexts with like means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longshore.weight_store.codec.plan import Ints

EXPONENTS = 256
MAX_CLASSES = 16
DENSE = 0.6
# Gap codes from here on are the range coder's.
ADAPTIVE = 128
# The last one of Golomb's: a gap always fits into what a reader has at hand.
MAX_GOLOMB = 100
UNUSED = 0
UNIT = 0
UNCHANGED = 255

Codes = npt.NDArray[np.uint8]
Counts = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """Classes of a section's pieces, and the codes of every context."""

    # [pieces]; UNCHANGED where nothing changed.
    classes: Codes
    # [classes, EXPONENTS]; UNUSED where nothing changed.
    gap: Codes
    step: Codes
    # [classes, EXPONENTS]: changes.
    counts: npt.NDArray[np.uint32]


def fit(elements: Counts, changed: Counts, excess: Counts) -> Model:
    """The cheapest model found, of a section's counts.

    Args:
        elements: [pieces, EXPONENTS], as all.
        changed: elements that changed.
        excess: sum of their steps' sizes less one, and two more for each that changed sign.
    """
    total = changed.sum(1)
    moved = np.flatnonzero(total)
    if not len(moved):
        none = np.zeros((0, EXPONENTS), np.uint8)
        return Model(np.full(len(total), UNCHANGED, np.uint8), none, none, none.astype(np.uint32))
    used = np.flatnonzero(changed.any(0))
    n, k = (table[np.ix_(moved, used)].astype(np.float64) for table in (elements, changed))
    rate = k.sum(0) / np.maximum(n.sum(0), 1)
    # Of each piece, how much denser it is than its exponents let expect, in octaves.
    density = np.log2((k.sum(1) + 2) / (n @ rate + 2))
    best, least = np.zeros(len(moved), np.int64), np.inf
    for per_octave in (0, 1, 2):
        labels = np.round((density - np.median(density)) * per_octave).astype(np.int64)
        if per_octave and not labels.any():
            continue
        labels = _refined(n, k, np.clip(labels, -(MAX_CLASSES // 2), MAX_CLASSES // 2 - 1))
        cost = _cost(n, k, labels)
        if cost >= least:
            break
        best, least = labels, cost
    classes = np.full(len(total), UNCHANGED, np.uint8)
    classes[moved] = best
    sums = [_sums(table[moved], best).astype(np.int64) for table in (elements, changed, excess)]
    return Model(classes, _gap_codes(sums[0], sums[1]), _step_codes(sums[1], sums[2]), sums[1].astype(np.uint32))


def _sums(table: npt.NDArray[Any], labels: Ints) -> Floats:
    """[classes, EXPONENTS]; whole numbers stay exact, being below 2**53."""
    own = labels == np.arange(int(labels.max()) + 1)[:, None]
    sums: Floats = own.astype(np.float64) @ table.astype(np.float64)
    return sums


def _refined(n: Floats, k: Floats, labels: Ints) -> Ints:
    """Labels from 0 on, each piece moved to the class whose rates suit it best."""
    labels = np.unique(labels, return_inverse=True)[1]
    for _ in range(2 if labels.any() else 0):
        rate = (_sums(k, labels) + 1e-3) / (_sums(n, labels) + 2e-3)
        labels = np.argmin(-(k @ np.log2(rate).T + (n - k) @ np.log2(1 - rate).T), axis=1)
        labels = np.unique(labels, return_inverse=True)[1]
    return labels


def _cost(n: Floats, k: Floats, labels: Ints) -> float:
    """Bits, about: of the gaps, and of what each context in use adds to header and streams."""
    total, changed = _sums(n, labels), _sums(k, labels)
    rate = np.clip(changed / np.maximum(total, 1), 1e-12, 1 - 1e-12)
    gaps = -(changed * np.log2(rate) + (total - changed) * np.log2(1 - rate)).sum()
    return float(gaps + np.count_nonzero(changed) * 18)


def _gap_codes(elements: Counts, changed: Counts) -> Codes:
    rate = np.clip(changed / np.maximum(elements, 1), 1e-9, 0.999)
    divisor = np.maximum(1.0, -1 / np.log2(1 - rate))
    steps = _DIVISORS.searchsorted(divisor)
    golomb = 1 + np.minimum(steps, MAX_GOLOMB - 1)
    codes = np.where(rate > DENSE, ADAPTIVE + np.minimum(rate * 64, 63).astype(np.int64), golomb)
    return np.where(changed > 0, codes, UNUSED).astype(np.uint8)


def _divisor(code: Ints) -> Floats:
    return ((4 + (code & 3)) << (code >> 2) >> 2).astype(np.float64)


# Up to which divisor each code is the nearest, by ratio.
_DIVISORS = np.sqrt(_divisor(np.arange(MAX_GOLOMB)) * _divisor(np.arange(1, MAX_GOLOMB + 1)))


def _step_codes(changed: Counts, excess: Counts) -> Codes:
    mean = excess / np.maximum(changed, 1)
    octaves = np.floor(2 * np.log2(np.maximum(mean, 2.0**-7))) + 15
    return np.where(excess > 0, np.clip(octaves, 1, 63), UNIT).astype(np.uint8)
