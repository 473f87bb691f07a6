"""What a policy version is made of: every weight in the dtype that is published, what they came from, and the canary.

The weights of a policy with adapters are `merge(base, products)`, where base is the model that it began as, rounded:
so a version can be sent as its products alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longshore.learner.lora import as_published, from_published, has_adapters, holding, parts
from longshore.learner.ranks.ranks import ALONE, Ranks
from longshore.learner.ranks.sharding import is_shared_out
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
    policy: torch.nn.Module,
    dtype: str,
    canary: Sequence[int],
    base: Sequence[Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Weights:
    """On every rank of those that share the policy out; the others than the leader get the canary alone.

    Args:
        policy: in float32, with adapters inside or without.
        dtype: "float32", "bfloat16" or "float16".
        canary: token ids.
        base: of a policy with adapters, as an earlier call gave it: it is not made again.
        ranks: those that share the policy out.
    """
    adapted = has_adapters(policy)
    begun: list[Tensor] = []
    tensors: list[Tensor] = []
    products: list[Product] = []
    held: dict[str, torch.Tensor] = {}
    for place, part in enumerate(parts(policy)):
        if not ranks.is_leader:
            # It has helped to bring the part together.
            continue
        # What is shared out has no room on one device, whole.
        device = part.value.device if ranks.size == 1 else torch.device("cpu")
        # Nobody trains what adapters are beside: where the dtype is its own, the memory is too.
        value = part.value.to(device, _DTYPES[dtype], copy=not adapted)
        begun.append(as_published(part.name, value) if base is None else base[place])
        if part.product is None:
            tensors.append(begun[-1])
        else:
            products.append(part.product)
            tensors += merge(begun[-1:], [part.product])
            value = from_published(tensors[-1]).to(device)
        held[part.name] = value
    told = Adapted(begun if base is None else base, products) if adapted else None
    return Weights(tensors, _probe(policy, held, canary), told)


def probe(policy: torch.nn.Module, tensors: Sequence[Tensor], canary: Sequence[int]) -> CanaryProbe:
    """The canary's log-probs under weights as published, by the names of the model without adapters. On every rank of
    those that share the policy out; the leader has the weights."""
    one = next(policy.parameters())
    device = torch.device("cpu") if is_shared_out(one) else one.device
    return _probe(policy, {tensor.name: from_published(tensor).to(device) for tensor in tensors}, canary)


def _probe(policy: torch.nn.Module, rounded: dict[str, torch.Tensor], canary: Sequence[int]) -> CanaryProbe:
    # With the weights as published, so that rounding is not taken for a fault.
    if not is_shared_out(next(policy.parameters())):
        rounded = {name: value.float() for name, value in rounded.items()}
    with holding(policy, rounded):
        return CanaryProbe(tuple(canary), tuple(canary_logprobs(policy, canary)))
