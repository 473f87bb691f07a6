"""Objectives of the form -sg(w_t) A_t log pi_t: they differ in how a token is weighted, and when it is left out."""

from __future__ import annotations

import torch

from longshore.config_objective import (
    CispoObjective,
    IcepopObjective,
    ReinforceSpec,
    SequenceMaskObjective,
    ToprObjective,
    VespoObjective,
)
from longshore.learner.objectives.tokens import (
    TokenBatch,
    TokenLoss,
    capped,
    chosen,
    nothing_masked,
    ratio_of,
    weighted,
)


def reinforce(tokens: TokenBatch, spec: ReinforceSpec) -> TokenLoss:
    """REINFORCE with truncated importance sampling (TIS).

        token level:     L_t = -sg(min(r_t, C)) A_t log pi_t
        sequence level:  L_t = -sg(min(s, C)) A_t log pi_t

    Sources: TIS as in IMPALA's rho-bar (arXiv 1802.01561) and AIPO of LlamaRL (arXiv 2505.24034); RLOO (arXiv
    2402.14740) is the sequence level with leave-one-out advantages and the sum over a reply's tokens.
    """
    log_ratio = tokens.log_ratio if spec.level == "token" else tokens.sums(tokens.log_ratio)
    return weighted(tokens, capped(log_ratio, spec.ratio_cap), nothing_masked(tokens))


def cispo(tokens: TokenBatch, spec: CispoObjective) -> TokenLoss:
    """CISPO: the weight is clipped, so that no token loses its gradient.

        L_t = -sg(clip(r_t, 1 - low, 1 + high)) A_t log pi_t

    Source: MiniMax-M1, arXiv 2506.13585 (where low = 1 leaves the lower side open).
    """
    weights = ratio_of(tokens.log_ratio.detach()).clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high)
    return weighted(tokens, weights, nothing_masked(tokens))


def icepop(tokens: TokenBatch, spec: IcepopObjective) -> TokenLoss:
    """IcePop: a token whose ratio leaves a band is dropped, the others are weighted by their ratio.

        L_t = -sg(k(r_t)) A_t log pi_t,   k(r) = r where low <= r <= high, else 0

    Source: the IcePop of Ring-1T (arXiv 2510.18855), here with one forward pass: pi stands for the trainer's policy
    before the update, which it is as long as a batch makes one train step.
    """
    ratio = ratio_of(tokens.log_ratio.detach())
    return weighted(tokens, ratio, (ratio < spec.low) | (ratio > spec.high))


def sequence_mask(tokens: TokenBatch, spec: SequenceMaskObjective) -> TokenLoss:
    """Masked importance sampling: whole sequences are dropped by a statistic of their ratios.

        L_t = -M sg(min(r_t, C)) A_t log pi_t
        M = 1 where the statistic lies within [low, high] and no r_t < veto, else 0
        product: s     geometric: s_g     k3: mean_t(r_t - log r_t - 1)

    Sources: MIS and the veto of "Your efficient RL framework secretly brings you off-policy RL training" (2025) and
    its follow-ups; geometric and K3 forms as in verl's rollout correction. Only the length-normalised statistics keep
    long sequences.
    """
    log_ratio = tokens.log_ratio.detach()
    low, high = spec.bounds
    if spec.statistic == "product":
        statistic = ratio_of(tokens.sums(log_ratio))
    elif spec.statistic == "geometric":
        statistic = ratio_of(tokens.means(log_ratio))
    else:
        statistic = tokens.means(ratio_of(log_ratio) - log_ratio - 1.0)
    vetoed = tokens.sums((ratio_of(log_ratio) < spec.veto).to(log_ratio.dtype)) > 0
    return weighted(tokens, capped(log_ratio, spec.ratio_cap), (statistic < low) | (statistic > high) | vetoed)


def topr(tokens: TokenBatch, spec: ToprObjective) -> TokenLoss:
    """Tapered off-policy REINFORCE: good rollouts unweighted, bad ones by their truncated sequence ratio.

        L_t = -A_t log pi_t  where A_t > 0;   -sg(min(s, C)) A_t log pi_t  elsewhere

    Source: TOPR, arXiv 2503.14286 (C = 1), with the sign of the advantage for that of the reward.
    """
    sequence = capped(tokens.sums(tokens.log_ratio), spec.negative_cap)
    weights = torch.where(tokens.advantages > 0, torch.ones_like(sequence), sequence)
    return weighted(tokens, weights, nothing_masked(tokens))


def vespo(tokens: TokenBatch, spec: VespoObjective) -> TokenLoss:
    """VESPO: a smooth kernel of the sequence's ratio that is 1 on-policy and falls to 0 on either side.

        L_t = -sg(phi(s)) A_t log pi_t,   phi(s) = exp(lambda) s^k exp(-lambda s)

    with (k, lambda) by the sign of the advantage (0 counts as positive). Source: arXiv 2602.10693.
    """
    log_s = tokens.sums(tokens.log_ratio.detach())
    positive = tokens.advantages >= 0
    k = chosen(positive, spec.k_positive, spec.k_negative, log_s)
    lam = chosen(positive, spec.lambda_positive, spec.lambda_negative, log_s)
    # In logarithms: s^k alone would overflow long before the kernel is anything but 0. (Its peak is below e^k.)
    return weighted(tokens, (lam + k * log_s - lam * ratio_of(log_s)).exp(), nothing_masked(tokens))
