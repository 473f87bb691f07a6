"""Whether a job's held-out tasks came out better after it than before: a paired, exact test. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# One a held-out task, in their order; None: no rollout came of it.
TaskRewards = Sequence[float | None]
# Rewards that are closer than this are alike.
ALIKE = 1e-9


@dataclass(frozen=True)
class Paired:
    """Held-out tasks before against after, each with itself.

    With rewards of 0 and 1 the test is McNemar's, exact: `worse` is his b (right before, wrong after), `better` his c.
    With other rewards it is the sign test.
    """

    # Tasks with a reward both times.
    tasks: int
    worse: int
    better: int
    # Probability, if nothing had changed, of a difference at least so large, either way.
    p: float


def paired(before: TaskRewards, after: TaskRewards) -> Paired:
    """Example: paired([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]) == Paired(tasks=3, worse=0, better=2, p=0.5)

    Raises:
        ValueError: they are not of the same tasks.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    worse = sum(b < a - ALIKE for a, b in pairs)
    better = sum(b > a + ALIKE for a, b in pairs)
    return Paired(len(pairs), worse, better, both_sides(worse, better))


def both_sides(b: int, c: int) -> float:
    """Two-sided p of b against c where each is as likely: min(1, 2 * sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c)).

    Source: McNemar, Psychometrika 12 (1947), with the exact binomial in place of his approximation.
    """
    number = b + c
    total = math.lgamma(number + 1) - number * math.log(2)
    tail = math.fsum(math.exp(total - math.lgamma(k + 1) - math.lgamma(number - k + 1)) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail)
