"""Bits per changed element of one policy version, in the encodings that public systems use and in Longshore's.

    python benchmarks/weight_sync_plot.py docs/images/weight-sync.png [CHAIN ...]     chains: smollm2 minilm gaussian

Each peer's encoding is written here as its documentation describes it, over the same tensors; see the table in
docs/weights.md for whose it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zstandard

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.weight_sync_codec import CHAINS, entropy  # noqa: E402
from benchmarks.weight_sync_steps import chain, missing  # noqa: E402
from longshore.weight_store.codec import delta  # noqa: E402
from longshore.weight_store.payload import Tensor  # noqa: E402

Bits = npt.NDArray[np.uint16]
# Bytes of one tensor's change, given its bits before and after.
Encoding = Callable[[Bits, Bits], int]


def _zstd(data: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=1).compress(data))


def _pairs(before: Bits, after: Bits) -> bytes:
    places = np.flatnonzero(before != after)
    return places.astype(np.uint32).tobytes() + after[places].tobytes()


def _gaps(before: Bits, after: Bits) -> bytes:
    places = np.flatnonzero(before != after)
    gaps = np.diff(places, prepend=0).astype(np.uint32)
    small = np.minimum(gaps, 255).astype(np.uint8)
    return small.tobytes() + gaps[gaps >= 255].tobytes() + after[places].tobytes()


def _xor(before: Bits, after: Bits) -> bytes:
    return (before ^ after).tobytes()


def _planes(before: Bits, after: Bits) -> bytes:
    return (before ^ after).view(np.uint8).reshape(-1, 2).T.tobytes()


PEERS: dict[str, Encoding] = {
    "index u32 + value": lambda before, after: len(_pairs(before, after)),
    "index + value, zstd-1": lambda before, after: _zstd(_pairs(before, after)),
    "gaps + value, zstd-1": lambda before, after: _zstd(_gaps(before, after)),
    "dense XOR, zstd-1": lambda before, after: _zstd(_xor(before, after)),
    "dense XOR in byte planes, zstd-1": lambda before, after: _zstd(_planes(before, after)),
}
OURS = "Longshore"
BOUND = "entropy, given tensor and old exponent"


def bits_per_change(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    """Encoding -> bits for each element that changed."""
    changed, sizes, bound = 0, dict.fromkeys(PEERS, 0), 0.0
    for old, new in zip(before, after, strict=True):
        a, b = np.frombuffer(old.data, np.uint16), np.frombuffer(new.data, np.uint16)
        changed += int((a != b).sum())
        for name, encoding in PEERS.items():
            sizes[name] += encoding(a, b)
        bound += entropy(a, b)
    ours = len(delta.encode(before, after))
    bits = {name: 8 * size / changed for name, size in sizes.items()}
    return {**bits, OURS: 8 * ours / changed, BOUND: bound / changed}


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    """One group of bars a chain."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = [*PEERS, OURS, BOUND]
    figure, axes = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    height = 0.8 / len(results)
    for number, (model, bits) in enumerate(results.items()):
        rows = [row + number * height for row in range(len(names))]
        bars = axes.barh(rows, [bits[name] for name in names], height, label=model)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("bits for each element that a version changed (bfloat16, lr 1e-6)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> int:
    path, *wanted = sys.argv[1:]
    results = {}
    for name in wanted or ["smollm2", "minilm", "gaussian"]:
        if missing(name):
            sys.stdout.write(f"{name}: needs {missing(name)}\n")
            continue
        before, after = islice(chain(name, 3, CHAINS).versions(), 2, 4)
        results[name] = bits_per_change(before, after)
        for encoding, bits in results[name].items():
            sys.stdout.write(f"{name:10} {encoding:40} {bits:6.2f}\n")
    plot(results, Path(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
