"""VCPO's two controls of variance (arXiv 2602.17616), beside any objective: a step scaled by the effective sample size,
and the baseline of least variance. Both are of the batch as a whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longshore.config_objective import EssStepSpec


def ess_share(log_weights: Tensor) -> float:
    """rho = (sum w)^2 / (B sum w^2) of B importance weights: 1 where all are alike, 1/B where one outweighs the rest.

    Args:
        log_weights: [B] log w; their common factor does not matter, and neither does its size. Empty: rho is 1.
    """
    if not log_weights.numel():
        return 1.0
    logs = log_weights.detach().double()
    rho = 2.0 * logs.logsumexp(0) - (2.0 * logs).logsumexp(0) - math.log(logs.numel())
    return float(rho.exp())


def step_scale(log_ratios: Tensor, spec: EssStepSpec) -> float:
    """What the learning rate is multiplied by: sqrt(rho / base), at most 1 (VCPO: eta_eff = eta sqrt(rho), for AdamW).

    Args:
        log_ratios: [B] log s of the batch's sequences.
        spec: base, and where the ratios are truncated first (w = min(s, cap)).
    """
    return min(1.0, math.sqrt(ess_share(log_ratios.clamp(max=math.log(spec.ratio_cap))) / spec.base))


def squared_gradients(logp: Tensor, collision: Tensor) -> Tensor:
    """[N] squared norm of grad log pi_t with respect to the logits: 1 - 2 pi_t + sum_v pi_v^2.

    Args:
        logp: [N] log pi_t.
        collision: [N] sum_v pi_v^2, the chance that two draws agree.
    """
    return (1.0 - 2.0 * logp.exp() + collision).clamp(min=0.0)


def optimal_baseline(
    advantages: Tensor, log_ratios: Tensor, norms: Tensor, sequences: Tensor, groups: Tensor
) -> Tensor:
    """[N] advantages minus the off-policy optimal baseline of their group:

        b* = sum_i s_i^2 g_i A_i / sum_i s_i^2 g_i,   g_i = |grad log pi(sequence i)|^2

    over the group's sequences i, A_i being a sequence's mean advantage (b* moves along when all A_i are shifted, so
    it does not matter which baseline they already have). g_i is taken at the logits, as the sum of the squared norms
    of its tokens, which spares one backward pass a sequence: an approximation to VCPO's norm over all weights. A
    sequence alone in its group (a late member) would be its own baseline: it keeps the advantage that it has.

    Args:
        advantages: [N] of every token of the batch.
        log_ratios: [N] log r_t.
        norms: [N] from `squared_gradients`.
        sequences: [N] number of the token's sequence, from 0; numbers may be missing.
        groups: [N] number of the token's group, from 0. All 0: one baseline for the batch.
    """
    if not advantages.numel():
        return advantages
    count = int(sequences.max()) + 1
    zeros = torch.zeros(count, dtype=torch.float64, device=advantages.device)
    lengths = zeros.index_add(0, sequences, torch.ones_like(advantages, dtype=torch.float64))
    log_s = zeros.index_add(0, sequences, log_ratios.double())
    g = zeros.index_add(0, sequences, norms.double())
    mean = zeros.index_add(0, sequences, advantages.double()) / lengths.clamp(min=1.0)
    group = torch.zeros(count, dtype=torch.long, device=advantages.device).index_copy(0, sequences, groups)
    present = lengths > 0
    # s^2 may overflow; only what the weights are relative to each other in a group matters.
    log_w = torch.where(present, 2.0 * log_s + g.clamp(min=1e-300).log(), -torch.inf)
    highest = torch.full((int(groups.max()) + 1,), -torch.inf, dtype=torch.float64, device=advantages.device)
    highest = highest.scatter_reduce(0, group, log_w, "amax")
    w = torch.where(present, (log_w - highest[group]).exp(), 0.0)
    sums = torch.zeros_like(highest).index_add(0, group, w)
    baseline = torch.zeros_like(highest).index_add(0, group, w * mean) / sums.clamp(min=1e-300)
    members = torch.zeros_like(highest).index_add(0, group, present.double())
    baseline = torch.where(members > 1, baseline, 0.0)
    return advantages - baseline[groups].to(advantages)
