"""Credit: from the rewards of a group to one advantage a rollout. Plain Python, no tensors: groups are small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

# Below this spread of rewards a group says nothing about which attempt was better.
ZERO_VARIANCE = 1e-8


def has_signal(rewards_G: Sequence[float]) -> bool:
    """Whether the rewards of a group differ at all; a single rollout has nothing to be compared with."""
    return len(rewards_G) > 1 and max(rewards_G) - min(rewards_G) > ZERO_VARIANCE


def group_advantages(rewards_G: Sequence[float], kind: Literal["group-mean", "group-mean-std"]) -> list[float]:
    """[G] rewards to [G] advantages.

    group-mean: A_i = R_i - mean(R) (Dr. GRPO, arXiv 2503.20783). group-mean-std: divided by the population standard
    deviation + 1e-6 (GRPO, arXiv 2402.03300, section 4.1.2).

    Example: group_advantages([1.0, 0.0], "group-mean") == [0.5, -0.5]
    """
    mean = math.fsum(rewards_G) / len(rewards_G)
    centred = [reward - mean for reward in rewards_G]
    if kind == "group-mean":
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / len(centred))
    return [value / (deviation + 1e-6) for value in centred]
