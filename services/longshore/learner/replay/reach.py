"""How far replay goes back, and how much of it there is: narrowed and widened by what the last batch has shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What a batch below the floor leaves of the reach, and what one above it adds. Down fast and up slowly: a batch of
# tokens that the policy has left behind costs more than a batch without them.
NARROWED, WIDENED = 0.7, 0.05
_LEAST = 0.01


@dataclass(frozen=True)
class Reach:
    """Between nothing (0) and everything that the job allows (1).

    Example: Reach(0.5).max_age(64) == 32 and Reach(0.5).groups(4) == 2
    """

    value: float = 1.0

    def after(self, ess: float | None, floor: float) -> Reach:
        """The reach for the next batch.

        Args:
            ess: effective share of the replayed tokens of this one; None: it had none, so nothing speaks against more.
            floor: the share below which the reach narrows; 0: it stays.
        """
        if floor <= 0:
            return self
        if ess is not None and ess < floor:
            return Reach(max(_LEAST, self.value * NARROWED))
        return Reach(min(1.0, self.value + WIDENED))

    def max_age(self, most: int) -> int:
        """Versions since the oldest token that a replayed group may have."""
        return max(1, math.ceil(self.value * most))

    def groups(self, most: int) -> int:
        """Groups that are replayed in a batch."""
        return round(self.value * most)
