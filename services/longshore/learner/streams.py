"""What a forward pass need not know, and an objective must: the streams of the sampled tokens, one entry a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longshore.learner.sequences import TrainSequence


@dataclass(frozen=True)
class TokenStreams:
    """[N] each: the sampled tokens of some sequences in reading order, sequence by sequence.

    The first token of a sequence is left out: it has nothing before it to be predicted from.
    """

    # What the engine recorded when it drew the token: log-prob, temperature, policy version.
    behaviour: Tensor
    temperature: Tensor
    versions: Tensor
    advantages: Tensor
    weights: Tensor
    rewards: Tensor
    # The token's sequence, as numbered by the caller: all of a sequence's tokens are in one forward pass.
    sequences: Tensor
    # The token's group and rollout, as numbered in the batch, and its turn there (-1: of none).
    groups: Tensor
    rollouts: Tensor
    turns: Tensor

    @staticmethod
    def joined(parts: Sequence[TokenStreams]) -> TokenStreams:
        """The streams of several forward passes behind each other."""
        names = [field.name for field in fields(TokenStreams)]
        return TokenStreams(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def streams_of(numbered: Iterable[tuple[int, TrainSequence]]) -> TokenStreams:
    """The streams of sequences in the given order, each with its number in the batch."""
    floats: list[tuple[float, float, float, float, float]] = []
    integers: list[tuple[int, int, int, int, int]] = []
    for number, sequence in numbered:
        for at in range(1, len(sequence.token_ids)):
            if sequence.sampled[at]:
                floats.append(
                    (
                        sequence.behaviour[at],
                        sequence.temperature[at],
                        sequence.advantages[at],
                        sequence.weights[at],
                        sequence.rewards[at],
                    )
                )
                integers.append((sequence.versions[at], number, sequence.group, sequence.rollout, sequence.turns[at]))
    behaviour, temperature, advantages, weights, rewards = (
        torch.tensor(floats, dtype=torch.float32).reshape(-1, 5).t().contiguous()
    )
    versions, sequences, groups, rollouts, turns = (
        torch.tensor(integers, dtype=torch.long).reshape(-1, 5).t().contiguous()
    )
    return TokenStreams(
        behaviour, temperature, versions, advantages, weights, rewards, sequences, groups, rollouts, turns
    )
