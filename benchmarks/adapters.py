"""LoRA: a version as adapters beside its base, against the delta of the merged weights.

Weights with SmolLM2-135M's shapes in float32 (normal, sigma 0.02), and adapters of rank 16 at every projection, whose
numbers move as AdamW's at 2e-4 do: by about that much a step. Both sides start from tensors in memory and end with
tensors that are proven by their BLAKE3; medians of five versions, one thread.

    python benchmarks/adapters.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common  # noqa: E402
from longshore.weight_store.codec import adapter, delta  # noqa: E402
from longshore.weight_store.payload import Tensor, tensor_info  # noqa: E402
from longshore.weight_store.product import Product  # noqa: E402

RANK, SCALE, RATE = 16, 2.0, 2e-4
VERSIONS = 5
HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 576, 1536, 192, 49152, 30
PROJECTIONS = {
    "q": (HIDDEN, HIDDEN),
    "k": (KEYS, HIDDEN),
    "v": (KEYS, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}

T = TypeVar("T")


@dataclass
class Side:
    """What one way of sending takes, version by version."""

    num_bytes: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    base = _base(rng, layers=3 if args.quick else LAYERS, vocabulary=1024 if args.quick else VOCABULARY)
    base_infos = [tensor_info(tensor) for tensor in base]
    factors = {tensor.name: _factors(tensor.shape, rng) for tensor in base[1:]}
    dense, small = Side(), Side()
    before = adapter.merge(base, _stepped(factors, rng))
    for _ in range(VERSIONS):
        products = _stepped(factors, rng)
        # Whoever publishes merges first, whichever way it is sent.
        after = adapter.merge(base, products)
        infos, old_infos = ([tensor_info(tensor) for tensor in tensors] for tensors in (after, before))
        payload = _timed(dense.encode_s, lambda: delta.encode(before, after))  # noqa: B023 - called at once
        dense.num_bytes.append(len(payload))
        _timed(dense.decode_s, lambda: delta.decode(payload, before, infos, base_infos=old_infos))  # noqa: B023
        sent = _timed(small.encode_s, lambda: adapter.encode(base, products))  # noqa: B023
        small.num_bytes.append(len(sent))
        made = _timed(small.decode_s, lambda: adapter.decode(sent, base, infos, base_infos=base_infos))  # noqa: B023
        assert [tensor.data for tensor in made] == [tensor.data for tensor in after]
        before = after
    _tell(report, "bytes a version", small.num_bytes, dense.num_bytes, 1e-6, "MB", 0.1)
    _tell(report, "encode", small.encode_s, dense.encode_s, 1.0, "s", 1.0)
    _tell(report, "decode + verify", small.decode_s, dense.decode_s, 1.0, "s", 1.0)


def _tell(
    report: common.Report,
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    factor: float,
    unit: str,
    at_most: float,
) -> None:
    mine, other = (factor * statistics.median(values) for values in (ours, theirs))
    against = f"delta of merged weights, {other:.3g} {unit}; adapters {mine:.3g} {unit}"
    report.add(name, mine / other, "x", against=against, at_most=at_most)


def _timed(seconds: list[float], work: Callable[[], T]) -> T:
    began = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - began)
    return result


def _base(rng: np.random.Generator, *, layers: int, vocabulary: int) -> list[Tensor]:
    """An embedding, and the projections of every layer."""
    shapes = {"embed": (vocabulary, HIDDEN)}
    shapes |= {f"layers.{layer}.{name}": shape for layer in range(layers) for name, shape in PROJECTIONS.items()}
    return [_tensor(name, 0.02 * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()]


def _factors(shape: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """down and up as LoRA begins: uniform, and zero."""
    rows, columns = shape
    bound = 1 / math.sqrt(columns)
    return [rng.uniform(-bound, bound, (RANK, columns)).astype(np.float32), np.zeros((rows, RANK), np.float32)]


def _stepped(factors: dict[str, list[np.ndarray]], rng: np.random.Generator) -> list[Product]:
    """Moves all factors by a step; they as products."""
    made = []
    for name, (down, up) in factors.items():
        for part in (down, up):
            part += RATE * rng.standard_normal(part.shape, np.float32)
        made.append(Product(name, _tensor("down", down), _tensor("up", SCALE * up)))
    return made


def _tensor(name: str, values: np.ndarray) -> Tensor:
    return Tensor(name, "float32", values.shape, values.astype(np.float32).tobytes())


if __name__ == "__main__":
    sys.exit(common.run(__doc__ or "", measure))
