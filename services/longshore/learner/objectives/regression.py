"""Objectives with a squared log-ratio: a pull to the behaviour policy that needs no clipping."""

from __future__ import annotations

import torch

from longshore.config_objective import DppoObjective, KimiObjective, OaplObjective
from longshore.learner.objectives.tokens import TokenBatch, TokenLoss, nothing_masked


def dppo(tokens: TokenBatch, spec: DppoObjective) -> TokenLoss:
    """Divergence PPO with a binary total-variation mask, plus Kimi's quadratic log-ratio term.

        L_t = -M_t sg(min(r_t, cap)) A_t log pi_t + quadratic (log r_t)^2
        M_t = 0 where (A_t > 0 and pi_t - mu_t > gap) or (A_t < 0 and pi_t - mu_t < -gap), else 1

    The mask compares probabilities, not ratios, so that rare tokens are not clipped for being rare. Needs no proximal
    policy: one forward pass. Sources: DPPO, arXiv 2602.04879 (binary TV mask); Kimi K2.5 (quadratic term).
    """
    log_ratio = tokens.log_ratio
    ratio = log_ratio.detach().exp().clamp(max=spec.ratio_cap)
    gap = tokens.logp.detach().exp() - tokens.behaviour.exp()
    outside = ((tokens.advantages > 0) & (gap > spec.max_probability_gap)) | (
        (tokens.advantages < 0) & (gap < -spec.max_probability_gap)
    )
    policy = torch.where(outside, torch.zeros_like(tokens.logp), -ratio * tokens.advantages * tokens.logp)
    return TokenLoss(policy + spec.quadratic * log_ratio.square(), outside)


def kimi(tokens: TokenBatch, spec: KimiObjective) -> TokenLoss:
    """Policy gradient with a quadratic pull to the behaviour policy.

        token level:     L_t = -A_t log pi_t + (tau / 2) (log r_t)^2
        sequence level:  L_t = -A_t log pi_t + (tau / 2) (log s)^2 / |o|

    Source: Kimi k1.5, arXiv 2501.12599 (sequence level). Divided by tau it has the gradient of DRO, arXiv
    2405.19107: 1/2 (R - V - tau log s)^2 / tau, with A = R - V.
    """
    if spec.level == "token":
        squares = tokens.log_ratio.square()
    else:
        squares = tokens.sums(tokens.log_ratio).square() / tokens.lengths
    return TokenLoss(-tokens.advantages * tokens.logp + 0.5 * spec.tau * squares, nothing_masked(tokens))


def oapl(tokens: TokenBatch, spec: OaplObjective) -> TokenLoss:
    """Squared regression of the sequence's log-ratio on its advantage over the soft value of its group.

        L = (beta log s - (R - V))^2,   V = b log mean_j exp(R_j / b)

    spread evenly over the sequence's tokens; A (their mean advantage) is R - V with the advantage `soft-value`. No
    importance ratio. Source: OAPL, arXiv 2602.19362 (after A*-PO, arXiv 2505.20686).
    """
    error = spec.beta * tokens.sums(tokens.log_ratio) - tokens.means(tokens.advantages)
    return TokenLoss(error.square() / tokens.lengths, nothing_masked(tokens))
