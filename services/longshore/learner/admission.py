"""Pace by admission (law 6): how many groups may be issued now.

    issued - consumed <= (target_staleness + 1) * batch

"Consumed" is trained on, with the version that came of it handed to the weight store, or ended. A target of 0 is
on-policy: the next tickets go out when the last version does. A target of 1 keeps one batch in the making while
another is trained on. What a rollout's staleness comes to is measured when it is consumed: a generator that is slow
to take up a version adds to it. Never more is issued than the job's remaining steps need, so that a finished job has
nothing left over.

Rollouts that await their verdict take no place, as long as they are not too many: what lies at home unscored takes
room on the broker and in the learner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Batches' worth of rollouts that may await their verdict before each further one takes a place after all.
AWAITING_BATCHES = 64


@dataclass(frozen=True)
class Admission:
    """The limits of one job, in groups.

    Example: Admission(groups_per_step=16, target_staleness=1).allowance(steps_left=100, in_flight=20) == 12
    """

    groups_per_step: int
    target_staleness: int
    group_size: int = 1

    @property
    def limit(self) -> int:
        """Most groups that may be out at any moment."""
        return (self.target_staleness + 1) * self.groups_per_step

    def allowance(self, steps_left: int, in_flight: int, awaiting: int = 0) -> int:
        """How many groups may be issued now.

        Args:
            steps_left: train steps that have not been taken yet.
            in_flight: training groups issued and not yet settled, without those that only await verdicts.
            awaiting: rollouts that await their verdict.
        """
        over = max(0, awaiting - AWAITING_BATCHES * self.groups_per_step * self.group_size)
        places = in_flight + math.ceil(over / self.group_size)
        return max(0, min(self.limit, steps_left * self.groups_per_step) - places)
