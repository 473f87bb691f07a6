"""Generalised advantage estimation over the sampled tokens of rollouts."""

from __future__ import annotations

from collections.abc import Sequence


def gae(
    rewards_S: Sequence[float], values_S: Sequence[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """[S] advantages and [S] returns of one rollout, which ends after its last token (V_{S+1} = 0).

        d_t = r_t + gamma V_{t+1} - V_t
        A_t = sum_l (gamma lam)^l d_{t+l}      return_t = A_t + V_t

    Source: arXiv 1506.02438, eq. 12 and 16. lam 1 gives R_t - V_t (Monte Carlo), lam 0 gives d_t. V_t is the value of
    what stands before token t.

    Args:
        rewards_S: what was earned at each token; the outcome stands at the last.
        values_S: V_t of each token.
        gamma: discount a token.
        lam: how far to look past the value head.
    """
    advantages, ahead, next_value = [0.0] * len(rewards_S), 0.0, 0.0
    for t in reversed(range(len(rewards_S))):
        error = rewards_S[t] + gamma * next_value - values_S[t]
        ahead = error + gamma * lam * ahead
        advantages[t], next_value = ahead, values_S[t]
    return advantages, [advantage + value for advantage, value in zip(advantages, values_S, strict=True)]
