"""What an adapter adds to a base: products of two small matrices, each to one tensor (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longshore.weight_store.payload import Tensor


@dataclass(frozen=True)
class Product:
    """`up` x `down`, both float32, added to the tensor called `name` of [rows, columns].

    Example: Product("q_proj.weight", down, up)  # down.shape == (16, 576), up.shape == (192, 16)
    """

    name: str
    # [rank, columns].
    down: Tensor
    # [rows, rank]; whatever the product is scaled by is in it.
    up: Tensor


@dataclass(frozen=True)
class Beside:
    """How a version comes from another one: that one's tensors, with products added to some of them."""

    version: int
    tensors: Sequence[Tensor]
    products: Sequence[Product]
