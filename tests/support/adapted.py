"""A small model whose versions are adapters beside one base: what a learner of LoRA publishes."""

from __future__ import annotations

import numpy as np

from longshore.signing import SigningKey
from longshore.types import JobRef
from longshore.weight_store.codec import adapter
from longshore.weight_store.payload import Tensor
from longshore.weight_store.product import Beside, Product
from longshore.weight_store.version import VersionDraft
from longshore.weights.parcel import Parcel, pack

SIDE, RANK = 96, 2


def base_tensors(dtype: str = "float32", seed: int = 0) -> list[Tensor]:
    """An embedding that no adapter touches, and two projections."""
    rng = np.random.default_rng(seed)
    values = [(rng.standard_normal((SIDE, SIDE)) / 8).astype(np.float32) for _ in range(3)]
    if dtype == "bfloat16":
        data = [(value.view(np.uint32) >> 16).astype(np.uint16).tobytes() for value in values]
    else:
        data = [value.astype(dtype).tobytes() for value in values]
    names = ("embed.weight", "q_proj.weight", "v_proj.weight")
    return [Tensor(name, dtype, (SIDE, SIDE), own) for name, own in zip(names, data, strict=True)]


def factor(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Tensor:
    return Tensor(name, "float32", shape, (rng.standard_normal(shape) / 16).astype(np.float32).tobytes())


def products(seed: int) -> list[Product]:
    """Other ones for each seed."""
    rng = np.random.default_rng(1000 + seed)
    return [
        Product(name, factor("down", (RANK, SIDE), rng), factor("up", (SIDE, RANK), rng))
        for name in ("q_proj.weight", "v_proj.weight")
    ]


def merged(seed: int) -> list[Tensor]:
    return adapter.merge(base_tensors(), products(seed))


def beside(seed: int, base: int = 0) -> Beside:
    return Beside(base, base_tensors(), products(seed))


def adapter_parcel(version: int, job: JobRef, key: SigningKey, *, base: int = 0, serial: int | None = None) -> Parcel:
    """A version as an adapter of `base`."""
    draft = VersionDraft(version, version, 1, None, (), 1.0)
    serial = version if serial is None else serial
    return pack(job, key, draft, merged(version), {"config.json": b"{}"}, serial, beside(version, base))
