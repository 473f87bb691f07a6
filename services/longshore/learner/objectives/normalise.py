"""How the losses of single tokens add up to the loss of a batch.

A scale a token, known before the first forward pass: the batch's loss is the sum of loss * weight * scale over its
tokens, in however many forward passes. Denominators count every sampled token, masked or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longshore.config_objective import Normalise
from longshore.learner.sequences import TrainSequence


@dataclass(frozen=True)
class Totals:
    """Counts over a whole batch of what carries loss."""

    tokens: int
    # [R] tokens of each rollout, by its position in the batch.
    by_rollout: Tensor

    @property
    def rollouts(self) -> int:
        return int((self.by_rollout > 0).sum())


def totals_of(sequences: Sequence[TrainSequence]) -> Totals:
    """Counts the sampled tokens that have something before them to be predicted from."""
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts[sequence.rollout] += sum(sequence.sampled[1:])
    by_rollout = torch.zeros(max(counts, default=-1) + 1, dtype=torch.long)
    for rollout, count in counts.items():
        by_rollout[rollout] = count
    return Totals(sum(counts.values()), by_rollout)


def trained_before(sequences: Sequence[TrainSequence]) -> Tensor:
    """[sequences] bool: whether a sequence's rollout was trained on before."""
    return torch.tensor([sequence.use > 1 for sequence in sequences], dtype=torch.bool)


def scales(kind: Normalise, rollouts: Tensor, totals: Totals, reply_limit: int | None) -> Tensor:
    """[N] factor of each token, for N tokens, R rollouts and |o| tokens in the token's rollout:

        tokens        1 / N           every token alike (DAPO, arXiv 2503.14476)
        rollouts      1 / (R |o|)     the mean of each rollout's mean (GRPO, arXiv 2402.03300)
        rollout-sums  1 / R           the mean of each rollout's sum (RLOO, arXiv 2402.14740)
        constant      1 / (R limit)   the same over a constant (Dr. GRPO, arXiv 2503.20783)

    Args:
        kind: which.
        rollouts: [N] the token's rollout, by its position in the batch.
        totals: of the whole batch.
        reply_limit: the most tokens that a rollout can have sampled.
    """
    by_rollout = totals.by_rollout.to(rollouts.device)
    if kind == "tokens":
        return torch.full(rollouts.shape, 1.0 / max(1, totals.tokens), device=rollouts.device)
    share = 1.0 / max(1, totals.rollouts)
    if kind == "rollouts":
        return share / by_rollout[rollouts].to(torch.float32)
    if kind == "constant":
        assert reply_limit is not None
        share /= reply_limit
    return torch.full(rollouts.shape, share, device=rollouts.device)
