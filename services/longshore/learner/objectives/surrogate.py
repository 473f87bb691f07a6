"""Objectives whose gradient runs through a ratio: the clipped surrogates and their kin."""

from __future__ import annotations

import torch
from torch import Tensor

from longshore.config_objective import (
    A3poObjective,
    DecoupledPpoObjective,
    GspoObjective,
    M2poObjective,
    SapoObjective,
    SurrogateSpec,
)
from longshore.learner.objectives.tokens import TokenBatch, TokenLoss, chosen, nothing_masked, ratio_of


def clip(tokens: TokenBatch, spec: SurrogateSpec) -> TokenLoss:
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7) as GRPO uses it (arXiv 2402.03300, eq. 3, beta = 0).

        L_t = -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)

    two_sided d: min(r_t, d) in place of r_t, so that a token of negative advantage that became much likelier cannot
    outweigh the batch (INTELLECT-2, arXiv 2505.07291). dual_clip c: where A_t < 0, L_t is at most -c A_t
    (arXiv 1912.09729). Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476: high > low) and REINFORCE++
    (arXiv 2501.03262) share this loss; they differ in advantages and normalisation.
    """
    ratio = ratio_of(tokens.log_ratio)
    masked = nothing_masked(tokens)
    if spec.two_sided is not None:
        masked = ratio > spec.two_sided
        ratio = ratio.clamp(max=spec.two_sided)
    surrogate = ratio * tokens.advantages
    bounded = ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high) * tokens.advantages
    loss = -torch.minimum(surrogate, bounded)
    masked = masked | (bounded < surrogate)
    if spec.dual_clip is not None:
        ceiling = -spec.dual_clip * tokens.advantages
        beyond = (tokens.advantages < 0) & (loss > ceiling)
        loss, masked = torch.where(beyond, ceiling, loss), masked | beyond
    return TokenLoss(loss, masked)


def gspo(tokens: TokenBatch, spec: GspoObjective) -> TokenLoss:
    """Group sequence policy optimization: one clipped, length-normalised ratio for all tokens of a sequence.

        L_t = -min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t),   s_t = sg(s_g) pi_t / sg(pi_t)

    Source: arXiv 2507.18071 (GSPO-token; with equal advantages in a sequence it has the gradient of GSPO).
    """
    sequence = tokens.means(tokens.log_ratio.detach())
    ratio = ratio_of(sequence) * (tokens.logp - tokens.logp.detach()).exp()
    surrogate = ratio * tokens.advantages
    bounded = ratio.clamp(1.0 - spec.clip_low, 1.0 + spec.clip_high) * tokens.advantages
    return TokenLoss(-torch.minimum(surrogate, bounded), bounded < surrogate)


def decoupled_ppo(tokens: TokenBatch, spec: DecoupledPpoObjective) -> TokenLoss:
    """PPO clipped against an anchor policy p, and weighted from the behaviour policy to the anchor.

        L_t = -sg(w_t) min(u_t A_t, clip(u_t, 1 - low, 1 + high) A_t),   w_t = p_t / mu_t,   u_t = pi_t / p_t

    Tokens with w_t above the cap are masked; the denominator counts them all the same. Source: AReaL, arXiv
    2505.24298 (after Hilton et al., arXiv 2110.00641). Without an anchor, p is pi before this update: u_t = 1.
    """
    anchor = tokens.logp.detach() if tokens.anchor is None else tokens.anchor
    return _decoupled(tokens, anchor, spec.clip_low, spec.clip_high, spec.weight_cap)


def a3po(tokens: TokenBatch, spec: A3poObjective) -> TokenLoss:
    """Decoupled PPO with the anchor interpolated between mu and pi by age, for no forward pass.

        log p_t = log mu_t + a_t sg(log pi_t - log mu_t),   a_t = (d_t - 1) / d_t for an age of d_t >= 1, else 0

    the anchor being the version before the current one; the rest as `decoupled_ppo`. A token of age 0 or 1 meets plain
    PPO. Source: A-3PO, arXiv 2512.06547.
    """
    ages = tokens.ages.to(tokens.behaviour.dtype)
    share = (ages - 1.0).clamp(min=0.0) / ages.clamp(min=1.0)
    anchor = tokens.behaviour + share * tokens.log_ratio.detach()
    return _decoupled(tokens, anchor, spec.clip_low, spec.clip_high, spec.weight_cap)


def _decoupled(tokens: TokenBatch, anchor: Tensor, low: float, high: float, cap: float) -> TokenLoss:
    weights = ratio_of(anchor - tokens.behaviour)
    ratio = ratio_of(tokens.logp - anchor)
    surrogate = ratio * tokens.advantages
    bounded = ratio.clamp(1.0 - low, 1.0 + high) * tokens.advantages
    dropped = weights > cap
    loss = torch.where(dropped, torch.zeros_like(surrogate), -weights * torch.minimum(surrogate, bounded))
    return TokenLoss(loss, dropped | (bounded < surrogate))


def m2po(tokens: TokenBatch, spec: M2poObjective) -> TokenLoss:
    """M2PO: an unclipped surrogate on the tokens that `second_moment_keep` left.

        L_t = -M_t r_t A_t

    Source: arXiv 2510.01161.
    """
    del spec
    loss = -ratio_of(tokens.log_ratio) * tokens.advantages
    return TokenLoss(torch.where(tokens.keep, loss, torch.zeros_like(loss)), ~tokens.keep)


def second_moment_keep(tokens: TokenBatch, spec: M2poObjective) -> Tensor:
    """[N] bool over a whole batch: what is left when the largest m_t = (log r_t)^2 are masked, one by one, until the
    mean of the others is below the threshold (M2PO, arXiv 2510.01161). Of equals the later goes first.
    """
    moments = tokens.log_ratio.detach().double().square()
    order = moments.sort(stable=True).indices
    # The mean of the k smallest grows with k, so the largest k below the threshold masks the fewest.
    means = moments[order].cumsum(0) / torch.arange(1, moments.numel() + 1, device=moments.device)
    keep = torch.zeros_like(tokens.behaviour, dtype=torch.bool)
    keep[order[means < spec.threshold]] = True
    return keep


def sapo(tokens: TokenBatch, spec: SapoObjective) -> TokenLoss:
    """Soft adaptive policy optimization: a sigmoid gate whose gradient fades away from the behaviour policy.

        L_t = -(4 / tau) sigmoid(tau (r_t - 1)) A_t,   tau by the sign of the advantage (0 counts as negative)

    On-policy the gradient is A_t grad log pi_t. Source: arXiv 2511.20347.
    """
    tau = chosen(tokens.advantages > 0, spec.tau_positive, spec.tau_negative, tokens.behaviour)
    gate = torch.sigmoid(tau * (ratio_of(tokens.log_ratio) - 1.0)) * 4.0 / tau
    return TokenLoss(-gate * tokens.advantages, nothing_masked(tokens))
