"""Credit: from the rewards of a group to one advantage a rollout. Plain Python, no tensors: groups are small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AdvantageKind = Literal["group-mean", "group-mean-std"]

# Below this spread of rewards a group says nothing about which attempt was better.
ZERO_VARIANCE = 1e-8


def has_signal(rewards_G: Sequence[float]) -> bool:
    """Whether the rewards of a group differ at all; a single rollout has nothing to be compared with."""
    return len(rewards_G) > 1 and max(rewards_G) - min(rewards_G) > ZERO_VARIANCE


def group_advantages(rewards_G: Sequence[float], kind: AdvantageKind) -> list[float]:
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


@dataclass(frozen=True)
class Baseline:
    """What a group's members earned when it was trained on; a member whose verdict comes later is compared with it.

    Example: baseline_of([1.0, 0.0]) == Baseline(mean=0.5, deviation=0.5)
    """

    mean: float
    # Population standard deviation.
    deviation: float


def baseline_of(rewards_G: Sequence[float]) -> Baseline:
    """The statistics of a group that has at least one member."""
    mean = math.fsum(rewards_G) / len(rewards_G)
    return Baseline(mean, math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards_G) / len(rewards_G)))


def late_advantage(reward: float, baseline: Baseline, kind: AdvantageKind) -> float:
    """Advantage of one late member.

    Members that were all alike say nothing about the scale of rewards: then the plain difference counts, for either
    kind.
    """
    centred = reward - baseline.mean
    if kind == "group-mean" or baseline.deviation <= ZERO_VARIANCE:
        return centred
    return centred / (baseline.deviation + 1e-6)
