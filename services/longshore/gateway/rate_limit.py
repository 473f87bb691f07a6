"""Token buckets: each caller may send so many requests a second, and a burst. Pure; the clock is given."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

# Callers that are remembered; beyond that the one that was silent longest is taken for new.
MAX_CALLERS = 10_000


@dataclass(frozen=True)
class Rate:
    """Example: Rate(per_s=50, burst=500)"""

    per_s: float
    burst: int


class RateLimiter:
    """Buckets by caller, of one rate."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        # Caller -> (requests left, as of when).
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, now: float) -> float:
        """Counts a request. 0: it may go on; otherwise the seconds after which the next may, and it was not counted."""
        left = self._left(caller, now)
        allowed = left >= 1
        self._put(caller, left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) / self._rate.per_s

    def _left(self, caller: str, now: float) -> float:
        left, at = self._buckets.get(caller, (float(self._rate.burst), now))
        return min(float(self._rate.burst), left + max(0.0, now - at) * self._rate.per_s)

    def _put(self, caller: str, left: float, now: float) -> None:
        self._buckets[caller] = (left, now)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
