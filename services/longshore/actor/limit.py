"""How many requests an actor keeps out at one generator: as many as it decodes, fewer when it says that it is pressed.

Additive increase, multiplicative decrease: many actors that share a generator and follow one rule come to equal shares
without knowing of each other (Chiu and Jain, 1989). The signal is the generator's own report, not a delay, because a
reply's duration says more of its length than of the generator's load. The report also says by how much it is too much:
all take the same share off, and together they are at what fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Requests that wait at a generator beyond this share of what it decodes together are too many: they would be better
# placed later, where there is room by then.
_WAITING_SHARE = 1 / 8
# Above these shares of its cache a generator is close to throwing out what it will have to compute again: the higher
# one for any request that waits although there are places, the lower one when more wait than should.
_KV_FULL, _KV_HIGH = 0.95, 0.85
# A generator whose places are taken to this share is busy; what waits at an idle one waits for a version.
_BUSY_SHARE = 0.9
# What a refusal leaves, and the most that any report takes away.
_DECREASE = 0.8
# Of a full cache this much is left free, so that what runs can grow.
_KV_HEADROOM = 0.95
# Of what it decodes together, with each report that shows room.
_INCREASE_SHARE = 1 / 64


@dataclass(frozen=True)
class Report:
    """What a generator says of itself. Example: Report(running=30, waiting=2, max_running=32, kv_used_ratio=0.7)"""

    running: int
    waiting: int
    max_running: int
    # Share of its KV cache in use, 0..1.
    kv_used_ratio: float
    # Policy versions in memory, the served one first.
    versions: tuple[int, ...] = ()

    @property
    def fits(self) -> float:
        """The share of its present requests that it can do with, at most 1: all of them."""
        if not self.waiting:
            return 1.0
        present = self.running + self.waiting
        places_are_taken = self.running >= _BUSY_SHARE * self.max_running
        if self.kv_used_ratio > _KV_FULL and not places_are_taken:
            return _KV_HEADROOM * self.running / present
        if places_are_taken or self.kv_used_ratio > _KV_HIGH:
            return min(1.0, (self.running + math.ceil(_WAITING_SHARE * self.max_running)) / present)
        return 1.0


class Limit:
    """The bound of one actor's outstanding requests at one generator."""

    def __init__(self) -> None:
        # Unbounded until the first report: nothing is sent before it.
        self._limit = math.inf
        # Many refusals at once are one piece of news.
        self._was_cut = False

    @property
    def value(self) -> int:
        """At least 1."""
        return max(1, int(self._limit)) if math.isfinite(self._limit) else 2**31

    def reported(self, report: Report, outstanding: int) -> None:
        """A report, and how many requests we had there when it came."""
        self._was_cut = False
        widest = report.max_running + math.ceil(_WAITING_SHARE * report.max_running)
        if math.isinf(self._limit):
            self._limit = float(max(1, widest))
        elif report.fits < 1.0:
            self._cut(outstanding, max(_DECREASE, report.fits))
        elif outstanding >= self.value:
            self._limit += max(1.0, _INCREASE_SHARE * report.max_running)
        self._limit = min(self._limit, float(max(1, widest)))

    def refused(self, outstanding: int) -> None:
        """The generator's queue is full."""
        self._cut(outstanding, _DECREASE)

    def _cut(self, outstanding: int, factor: float) -> None:
        if self._was_cut:
            return
        self._was_cut = True
        # From what is really out there: a bound far above it would have to be cut many times to be felt. One more than
        # that, so that fractions are not lost where the bound is small.
        self._limit = max(1.0, factor * min(self._limit, outstanding + 1))
