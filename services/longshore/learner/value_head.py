"""A value head on the policy's trunk, and what becomes of its answers: generalised advantages over a whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longshore.config_credit import Gae
from longshore.learner.credit.gae import gae
from longshore.learner.credit.group import EPSILON
from longshore.learner.streams import TokenStreams


def new_value_head(hidden_size: int) -> torch.nn.Linear:
    """Answers 0 to everything at first: an honest "don't know"."""
    head = torch.nn.Linear(hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def values_of(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """[N, E] hidden states to [N] values, in float32."""
    values: Tensor = head(hidden.float()).squeeze(-1)
    return values


def generalised_advantages(streams: TokenStreams, values: Tensor, spec: Gae) -> tuple[Tensor, Tensor]:
    """[N] advantages and [N] returns of every token of a batch, from the rewards in its streams.

    A rollout's sampled tokens follow each other whatever stands between them: in the order of its sequences, and there
    in reading order. With `whiten`, advantages are (A - mean) / (std + 1e-6) over the batch's tokens.

    Args:
        streams: of the whole batch.
        values: [N] of what stands before each token.
        spec: discounts.
    """
    order = _by_rollout(streams)
    rollouts = streams.rollouts[order].tolist()
    rewards, known = streams.rewards[order].tolist(), values.detach()[order].tolist()
    advantages: list[float] = []
    returns: list[float] = []
    start = 0
    while start < len(rollouts):
        end = start
        while end < len(rollouts) and rollouts[end] == rollouts[start]:
            end += 1
        own, earned = gae(rewards[start:end], known[start:end], spec.gamma, spec.lam)
        advantages += own
        returns += earned
        start = end
    if spec.whiten and advantages:
        mean = math.fsum(advantages) / len(advantages)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in advantages) / len(advantages))
        advantages = [(value - mean) / (deviation + EPSILON) for value in advantages]
    return _back(advantages, order, values), _back(returns, order, values)


def _by_rollout(streams: TokenStreams) -> Tensor:
    # Stable sorts: by sequence within a rollout, in reading order within a sequence.
    first = streams.sequences.sort(stable=True).indices
    return first[streams.rollouts[first].sort(stable=True).indices]


def _back(numbers: list[float], order: Tensor, like: Tensor) -> Tensor:
    placed = torch.empty_like(like.detach())
    placed[order] = torch.tensor(numbers, dtype=placed.dtype, device=placed.device)
    return placed
