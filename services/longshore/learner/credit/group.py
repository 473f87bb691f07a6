"""Credit within a group: from the rewards of one task's rollouts to one advantage a rollout. Plain Python, no tensors:
groups are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Below this spread of rewards a group says nothing about which attempt was better.
ZERO_VARIANCE = 1e-8
# What GRPO adds to a standard deviation before it divides by it.
EPSILON = 1e-6


def has_signal(rewards_G: Sequence[float]) -> bool:
    """Whether the rewards of a group differ at all; a single rollout has nothing to be compared with."""
    return len(rewards_G) > 1 and max(rewards_G) - min(rewards_G) > ZERO_VARIANCE


def mean_of(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def deviation_of(values: Sequence[float]) -> float:
    """Population standard deviation; 0 of nothing."""
    mean = mean_of(values)
    return math.sqrt(mean_of([(value - mean) ** 2 for value in values]))


@dataclass(frozen=True)
class Baseline:
    """What a group's members earned when it was trained on; a member whose verdict comes later is compared with them.

    Example: Baseline((1.0, 0.0)).mean == 0.5
    """

    rewards: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean_of(self.rewards)

    @property
    def deviation(self) -> float:
        return deviation_of(self.rewards)


def centred(rewards_G: Sequence[float]) -> list[float]:
    """A_i = R_i - mean(R) (Dr. GRPO, arXiv 2503.20783). Example: centred([1.0, 0.0]) == [0.5, -0.5]"""
    mean = mean_of(rewards_G)
    return [reward - mean for reward in rewards_G]


def standardised(rewards_G: Sequence[float]) -> list[float]:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-6), std of the population (GRPO, arXiv 2402.03300, section 4.1.2)."""
    deviation = deviation_of(rewards_G)
    return [value / (deviation + EPSILON) for value in centred(rewards_G)]


def leave_one_out(rewards_G: Sequence[float]) -> list[float]:
    """A_i = R_i - sum_{j != i} R_j / (G - 1) (RLOO, arXiv 2402.14740); 0 for a lonely rollout.

    Example: leave_one_out([1.0, 0.0, 0.5]) == [0.75, -0.75, 0.0]
    """
    if len(rewards_G) < 2:
        return [0.0 for _ in rewards_G]
    # R_i - mean of the others = (R_i - mean of all) * G / (G - 1).
    share = len(rewards_G) / (len(rewards_G) - 1)
    return [value * share for value in centred(rewards_G)]


def soft_value(rewards_G: Sequence[float], temperature: float) -> float:
    """V = b log mean_j exp(R_j / b) (OAPL, arXiv 2602.19362): between the mean (b large) and the best (b small).

    0 of nothing. The best reward is taken out first, so that no exponential overflows.
    """
    if not rewards_G:
        return 0.0
    best = max(rewards_G)
    return best + temperature * math.log(mean_of([math.exp((reward - best) / temperature) for reward in rewards_G]))


def above_soft_value(rewards_G: Sequence[float], temperature: float) -> list[float]:
    """A_i = R_i - V with V from `soft_value`."""
    value = soft_value(rewards_G, temperature)
    return [reward - value for reward in rewards_G]


def overlong_penalty(num_sampled: int, limit: int, buffer: int, penalty: float) -> float:
    """What is added to the reward of a rollout of so many sampled tokens, at most 0 (DAPO, arXiv 2503.14476, eq. 13):

        min(-(n - (limit - buffer)) / buffer * penalty, 0), and -penalty beyond the limit

    Example: overlong_penalty(18_000, limit=20_000, buffer=4_000, penalty=1.0) == -0.5
    """
    return -penalty * min(1.0, max(0.0, (num_sampled - (limit - buffer)) / buffer))
