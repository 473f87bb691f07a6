"""Weights of earlier policies that a train step compares the current one with: the reference, and the anchor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from longshore.learner.lora import trained_parameters

REFERENCE, ANCHOR = "reference", "anchor"


class FrozenPolicies:
    """The reference: the weights before the first train step. The anchor: those of every `anchor_every` train steps.

    They are lent to the one policy for a forward pass without gradients; each costs the memory of its weights, the
    time of that pass, and a place in every checkpoint.
    """

    def __init__(self, has_reference: bool, anchor_every: int | None) -> None:
        """
        Args:
            has_reference: whether there is one.
            anchor_every: train steps between two anchors; None or 1: the policy in training is its own.
        """
        self._has_reference = has_reference
        self._anchor_every = anchor_every if anchor_every is not None and anchor_every > 1 else None
        # Name -> parameter -> weights.
        self.weights: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """Which of them there are."""
        return sorted(self.weights)

    def renew(self, number: int, policy: torch.nn.Module) -> None:
        """Before train step `number` (from 1): takes the weights that are to be kept from here on."""
        if self._has_reference and REFERENCE not in self.weights:
            self.weights[REFERENCE] = _copied(policy)
        if self._anchor_every is not None and (ANCHOR not in self.weights or (number - 1) % self._anchor_every == 0):
            self.weights[ANCHOR] = _copied(policy)

    @contextmanager
    def lent_to(self, policy: torch.nn.Module, name: str) -> Iterator[None]:
        """The policy has these weights inside, and its own again afterwards."""
        own = _copied(policy)
        _assign(policy, self.weights[name])
        try:
            yield
        finally:
            _assign(policy, own)


def _copied(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(policy)}


def _assign(policy: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trained_parameters(policy):
            parameter.copy_(weights[name])
