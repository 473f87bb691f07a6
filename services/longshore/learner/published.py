"""What a policy version is made of: every weight in the dtype that is published, what they came from, and the canary.

The weights of a policy with adapters are `merge(base, products)`, where base is the model that it began as, rounded:
so a version can be sent as its products alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longshore.learner.lora import as_published, from_published, has_adapters, holding, parts
from longshore.learner.trainer import canary_logprobs
from longshore.weight_store.codec.adapter import is_sendable, merge
from longshore.weights.client import CanaryProbe, Product, Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Adapted:
    """What the weights of a policy with adapters are the sum of."""

    # The same for as long as the policy lives.
    base: Sequence[Tensor]
    products: Sequence[Product]

    @property
    def is_sendable(self) -> bool:
        """Whether every product is smaller than its tensor, and finite."""
        return all(map(is_sendable, self.products))


@dataclass(frozen=True)
class Weights:
    """A policy's weights as published; training may go on."""

    tensors: Sequence[Tensor]
    canary: CanaryProbe
    # None: the policy has no adapters.
    adapted: Adapted | None


def published(
    policy: torch.nn.Module, dtype: str, canary: Sequence[int], base: Sequence[Tensor] | None = None
) -> Weights:
    """
    Args:
        policy: in float32, with adapters inside or without.
        dtype: "float32", "bfloat16" or "float16".
        canary: token ids.
        base: of a policy with adapters, as an earlier call gave it: it is not made again.
    """
    if has_adapters(policy):
        adapted = Adapted(_base(policy, dtype) if base is None else base, _products(policy))
        tensors = merge(adapted.base, adapted.products)
        return Weights(tensors, probe(policy, tensors, canary), adapted)
    rounded = {part.name: part.value.to(_DTYPES[dtype], copy=True) for part in parts(policy)}
    tensors = [as_published(name, value) for name, value in rounded.items()]
    return Weights(tensors, _probe(policy, rounded, canary), None)


def probe(policy: torch.nn.Module, tensors: Sequence[Tensor], canary: Sequence[int]) -> CanaryProbe:
    """The canary's log-probs under weights as published, by the names of the model without adapters."""
    device = next(policy.parameters()).device
    return _probe(policy, {tensor.name: from_published(tensor).to(device) for tensor in tensors}, canary)


def _probe(policy: torch.nn.Module, rounded: dict[str, torch.Tensor], canary: Sequence[int]) -> CanaryProbe:
    # With the weights as published, so that rounding is not taken for a fault.
    with holding(policy, {name: value.float() for name, value in rounded.items()}):
        return CanaryProbe(tuple(canary), tuple(canary_logprobs(policy, canary)))


def _base(policy: torch.nn.Module, dtype: str) -> list[Tensor]:
    # Nobody trains these: where the dtype is their own, the memory is too.
    return [as_published(part.name, part.value.to(_DTYPES[dtype])) for part in parts(policy)]


def _products(policy: torch.nn.Module) -> list[Product]:
    return [part.product for part in parts(policy) if part.product is not None]
