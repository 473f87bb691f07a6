"""Policy objectives: each one a short pure function from per-token streams to a per-token loss.

All tensors are [N], one entry a sampled token of the batch, in float32. `logp` carries gradients; `behaviour` (the
engine's recorded log-probs) and `advantages` do not. The learner sums the loss and divides by its token count; what
an objective returns knows nothing of groups, staleness or schedules (law 8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longshore.config import ClipObjective, DppoObjective


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token, and whether the trust region let its gradient through."""

    # [N]
    loss: Tensor
    # [N] bool; True: the policy-gradient term was masked or clipped away.
    masked: Tensor


ObjectiveFn = Callable[[Tensor, Tensor, Tensor], TokenLoss]


def dppo(logp: Tensor, behaviour: Tensor, advantages: Tensor, spec: DppoObjective) -> TokenLoss:
    """Divergence PPO with a binary total-variation mask, plus Kimi's quadratic log-ratio term.

        L_t = -M_t * sg(min(r_t, cap)) * A_t * log pi_t + quadratic * (log r_t)^2,   r_t = pi_t / mu_t
        M_t = 0 where (A_t > 0 and pi_t - mu_t > gap) or (A_t < 0 and pi_t - mu_t < -gap), else 1

    The mask compares probabilities, not ratios, so that rare tokens are not clipped for being rare. Needs no proximal
    policy: one forward pass. Sources: DPPO, arXiv 2602.04879 (binary TV mask); Kimi K2.5 (quadratic term).
    """
    log_ratio = logp - behaviour
    ratio = log_ratio.detach().exp().clamp(max=spec.ratio_cap)
    gap = logp.detach().exp() - behaviour.exp()
    outside = ((advantages > 0) & (gap > spec.max_probability_gap)) | (
        (advantages < 0) & (gap < -spec.max_probability_gap)
    )
    policy = torch.where(outside, torch.zeros_like(logp), -ratio * advantages * logp)
    return TokenLoss(policy + spec.quadratic * log_ratio.square(), outside)


def clip(logp: Tensor, behaviour: Tensor, advantages: Tensor, spec: ClipObjective) -> TokenLoss:
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7) as GRPO uses it (arXiv 2402.03300, eq. 3, beta = 0).

    L_t = -min(r_t * A_t, clip(r_t, 1 - low, 1 + high) * A_t),   r_t = pi_t / mu_t
    """
    ratio = (logp - behaviour).exp()
    clipped = ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high)
    surrogate, bounded = ratio * advantages, clipped * advantages
    return TokenLoss(-torch.minimum(surrogate, bounded), bounded < surrogate)


def build_objective(spec: DppoObjective | ClipObjective) -> ObjectiveFn:
    """The objective that a JobSpec names, with its hyper-parameters bound."""
    if isinstance(spec, DppoObjective):
        return lambda logp, behaviour, advantages: dppo(logp, behaviour, advantages, spec)
    return lambda logp, behaviour, advantages: clip(logp, behaviour, advantages, spec)
