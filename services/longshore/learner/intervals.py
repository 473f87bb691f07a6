"""How sure a mean reward is: 95 % intervals. Plain Python, and the same for the same rewards."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from longshore.learner.credit.group import mean_of

# 97.5 % of a standard normal lies below it.
Z = 1.959963984540054
RESAMPLES = 1000
WILSON, BOOTSTRAP = "wilson", "bootstrap"


@dataclass(frozen=True)
class Interval:
    """A mean, and between what it lies with a confidence of 95 %.

    Example: Interval(mean=0.5, low=0.237, high=0.763, method="wilson") of 5 right answers in 10
    """

    mean: float
    low: float
    high: float
    method: str


def interval_of(rewards: Sequence[float]) -> Interval | None:
    """Wilson's interval where all rewards are 0 or 1, else a bootstrap's. None of nothing."""
    if not rewards:
        return None
    if all(reward in (0.0, 1.0) for reward in rewards):
        low, high = wilson(round(sum(rewards)), len(rewards))
        return Interval(mean_of(rewards), low, high, WILSON)
    low, high = bootstrap(rewards)
    return Interval(mean_of(rewards), low, high, BOOTSTRAP)


def wilson(successes: int, number: int) -> tuple[float, float]:
    """Bounds of a rate: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / number.

    Source: Wilson, JASA 22 (1927). Example: wilson(0, 10) == (0.0, 0.2775...): none of 10 is not never.
    """
    p, share = successes / number, Z * Z / number
    centre = p + share / 2
    reach = Z * math.sqrt(p * (1 - p) / number + share / (4 * number))
    low, high = (centre - reach) / (1 + share), (centre + reach) / (1 + share)
    return (0.0 if not successes else max(0.0, low)), (1.0 if successes == number else min(1.0, high))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a mean: the 2.5 % and the 97.5 % percentile of the means of 1000 resamples (Efron, 1979)."""
    rng = random.Random(len(values))  # noqa: S311 - repeatable, not secret
    means = sorted(mean_of(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = RESAMPLES // 40
    return means[cut], means[-1 - cut]
