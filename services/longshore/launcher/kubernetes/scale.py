"""How many pods a service should have for the tickets that are there. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from longshore.launcher.kubernetes.cluster_settings import ScaleSettings

# Down again only after tickets have been few for this long: a pod's start costs more than its idling.
COOLDOWN_S = 300.0


@dataclass(frozen=True)
class Demand:
    """Tickets at a site. Example: Demand(queued=120, running=64)"""

    queued: int
    running: int

    @property
    def tickets(self) -> int:
        return self.queued + self.running


def pods_for(demand: Demand, each: int, bounds: ScaleSettings) -> int:
    """As many as have work, of which each does `each` tickets at a time, within the bounds.

    Example: pods_for(Demand(120, 64), each=64, bounds=ScaleSettings(min=1, max=8)) -> 3
    """
    return min(bounds.max, max(bounds.min, math.ceil(demand.tickets / each)))


class Steady:
    """The most that was needed of late: up at once, down after `COOLDOWN_S` of less."""

    def __init__(self) -> None:
        # (time, pods), each with fewer pods than the one before.
        self._needs: deque[tuple[float, int]] = deque()

    def want(self, pods: int, now: float) -> int:
        """`now`: seconds on any clock that goes forward."""
        while self._needs and self._needs[-1][1] <= pods:
            self._needs.pop()
        self._needs.append((now, pods))
        while self._needs[0][0] < now - COOLDOWN_S:
            self._needs.popleft()
        return self._needs[0][1]
