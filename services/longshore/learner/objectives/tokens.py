"""What an objective is given, and what it returns.

    objective(tokens: TokenBatch, spec) -> TokenLoss

All tensors are [N], one entry a sampled token of a forward pass, in reading order; all tokens of a sequence are in the
same pass. Only `logp` carries gradients. An objective knows nothing of groups, schedules, packing or micro-batches
(law 8): the loss of a batch is the sum over its tokens of `loss * weight * scale`, where the scale (normalise.py) and
whatever else depends on the batch as a whole (`keep`, shifted advantages) was worked out before the first gradient.

Notation in the docstrings: mu is the behaviour policy (what the engine recorded), pi the policy in training,
r_t = pi_t / mu_t a token's ratio, s = prod_t r_t that of its sequence, s_g = s^(1/|o|) its geometric mean, A_t the
advantage, sg(.) stops the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Log-ratios beyond this are as good as infinite: they are held here before they are exponentiated, with no gradient.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one forward pass; each tensor is [N].

    Example: two sequences, of two tokens and of one:
        logp [-0.5, -0.1, -2.0]  behaviour [-0.6, -0.1, -1.0]  advantages [1, 1, -1]  sequences [0, 0, 1]
    """

    # Under pi, with gradients, and under mu.
    logp: Tensor
    behaviour: Tensor
    advantages: Tensor
    # Number of the token's sequence, from 0; numbers may be missing.
    sequences: Tensor
    # Versions published since the token's own; 0 where none was.
    ages: Tensor
    # False: masked by what was worked out over the whole batch.
    keep: Tensor
    # Under the anchor policy, where the objective has one that is not pi itself.
    anchor: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """[N] log r_t, with gradients."""
        return self.logp - self.behaviour

    def sums(self, values: Tensor) -> Tensor:
        """[N]: at each token the sum of `values` over its sequence."""
        return self._per_sequence(values)[self.sequences]

    def means(self, values: Tensor) -> Tensor:
        """[N]: at each token the mean of `values` over its sequence."""
        return self.sums(values) / self.lengths

    @property
    def lengths(self) -> Tensor:
        """[N]: how many tokens the token's sequence has."""
        return self.sums(torch.ones_like(self.behaviour))

    def _per_sequence(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._count).index_add(0, self.sequences, values)

    @cached_property
    def _count(self) -> int:
        # Kept: on a GPU it has to be waited for.
        return int(self.sequences.max()) + 1 if self.sequences.numel() else 0


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token, and whether the trust region took its policy gradient away."""

    # [N]
    loss: Tensor
    # [N] bool; True: the policy-gradient term was masked or clipped away.
    masked: Tensor


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp of log-ratios, held within e^±20: finite whatever comes."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def capped(log_ratio: Tensor, cap: float) -> Tensor:
    """sg(min(exp(log_ratio), cap)); finite also where the exponential is not."""
    return log_ratio.detach().exp().clamp(max=cap)


def weighted(tokens: TokenBatch, weights: Tensor, masked: Tensor) -> TokenLoss:
    """-sg(w_t) A_t log pi_t, and nothing where masked."""
    loss = -weights.detach() * tokens.advantages * tokens.logp
    return TokenLoss(torch.where(masked, torch.zeros_like(loss), loss), masked)


def nothing_masked(tokens: TokenBatch) -> Tensor:
    """[N] of False."""
    return torch.zeros_like(tokens.logp, dtype=torch.bool)


def chosen(where: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """[N] one number or the other, of the dtype of `like`."""
    return torch.where(where, like.new_full((), yes), like.new_full((), no))
