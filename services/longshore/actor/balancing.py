"""Which generator draws a reply. Pure: no gRPC, no waiting, no clock of its own.

The rule, in this order (docs/many-generators.md):

1. Usable is a generator that serves a proven version (health), answers for our job, and is not set aside. Of these,
   those with room under their limit are candidates (limit.py).
2. Of these, those that hold a version by which the request may be answered, if there are any.
3. A rollout's later turns go where its earlier ones were drawn, a group's first turns where the group's newest was:
   that generator holds their prefix. Unless it is overloaded: fuller than the emptiest candidate by more than `_WORTH`.
4. Anything else goes to the least loaded of `_SAMPLE` candidates taken at random, so that many actors that read the
   same report do not all choose the same one.

One that breaks connections, or fails on requests again and again, is set aside with growing pauses; after a pause a
single request tries it, and its first tokens bring it back. So does becoming healthy anew: it has proven itself then.
"""

from __future__ import annotations

import enum
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from longshore.actor.limit import Limit, Report

# How much fuller, as a share of what it decodes together, the holder of a prefix may be.
_WORTH = 0.25
_SAMPLE = 3
# Holders that are remembered: rollouts and groups. The ones asked for longest ago are forgotten.
_MAX_HOLDERS = 16_384
_FIRST_ASIDE_S = 0.5
_LONGEST_ASIDE_S = 30.0
# Requests in a row on which a generator may fail before it is at fault, not they.
_MAX_FAULTS = 3


class Trouble(enum.Enum):
    """How a request failed at a generator."""

    # The connection or the reply broke, or it says that it is unavailable.
    AWAY = "away"
    # Its queue is full.
    FULL = "full"
    # It failed on the request, or answered what may not be answered.
    FAULT = "fault"
    # Nothing that speaks against it: it no longer has the version, or the reply took longer than it draws for anybody.
    REQUEST = "request"
    # The reply was moved away from it.
    LATE = "late"


@dataclass
class _Generator:
    """What is known of one."""

    serving: bool = False
    report: Report | None = None
    limit: Limit = field(default_factory=Limit)
    # Our requests at it, and what it had of others' when it last reported.
    outstanding: int = 0
    others: int = 0
    # Since the last time that it gave tokens.
    aways: int = 0
    faults: int = 0
    aside_until: float = 0.0

    @property
    def is_suspect(self) -> bool:
        return self.aways > 0 or self.faults >= _MAX_FAULTS

    @property
    def load(self) -> float:
        width = self.report.max_running if self.report else 1
        return (self.outstanding + self.others) / max(1, width)

    @property
    def has_room(self) -> bool:
        # One request at a time tries a generator that was set aside.
        return self.outstanding < (1 if self.is_suspect else self.limit.value)

    def is_usable(self, now: float) -> bool:
        ready = self.serving and self.report is not None
        return ready and (not self.is_suspect or now >= self.aside_until)


@dataclass(frozen=True)
class Standing:
    """One generator as metrics show it."""

    name: str
    serving: bool
    set_aside: bool
    outstanding: int
    limit: int


class Balancer:
    """Chooses among the generators that one actor knows."""

    def __init__(self, clock: Callable[[], float], chance: random.Random | None = None) -> None:
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311 - spreading, not secrecy
        self._generators: dict[str, _Generator] = {}
        # Prefix -> the generator that holds it, most recently used last.
        self._holders: OrderedDict[str, str] = OrderedDict()

    def join(self, name: str) -> bool:
        """Whether it was not there yet."""
        if name in self._generators:
            return False
        self._generators[name] = _Generator()
        return True

    def leave(self, name: str) -> None:
        """It is chosen no more; what it draws for us may finish."""
        self._generators.pop(name, None)

    def serves(self, name: str, serving: bool) -> None:
        """What its health says. Healthy anew, it starts with a clean record and an empty cache."""
        known = self._generators.get(name)
        if known is None or known.serving == serving:
            return
        known.serving = serving
        known.aways = known.faults = 0
        # A report from before says nothing of what it is now.
        known.report = None

    def reported(self, name: str, report: Report) -> None:
        known = self._generators.get(name)
        if known is not None:
            known.report = report
            known.others = max(0, report.running + report.waiting - known.outstanding)
            known.limit.reported(report, known.outstanding)

    def usable(self) -> list[str]:
        now = self._clock()
        return [name for name, known in self._generators.items() if known.is_usable(now)]

    def choose(
        self, prefixes: Iterable[str], avoid: Collection[str] = (), accepts: Callable[[int], bool] | None = None
    ) -> str | None:
        """The generator for a request; None: none has room.

        Args:
            prefixes: what the request shares with others, nearest first.
            accepts: whether a policy version may answer it; None: any may.
        """
        candidates = self._candidates(avoid)
        if accepts is not None:
            # Where none has such a version, one will have to bring it, or to wait for it.
            candidates = [name for name in candidates if self._has(name, accepts)] or candidates
        if not candidates:
            return None
        emptiest = min(self._generators[name].load for name in candidates)
        for prefix in prefixes:
            holder = self._holders.get(prefix)
            if holder in candidates and self._generators[holder].load <= emptiest + _WORTH:
                return holder
        some = self._chance.sample(candidates, min(_SAMPLE, len(candidates)))
        return min(some, key=lambda name: self._generators[name].load)

    def has_room(self, avoid: Collection[str] = ()) -> bool:
        """Whether any generator has, but for those to be avoided."""
        return bool(self._candidates(avoid))

    def has_others(self, names: Collection[str]) -> bool:
        """Whether a generator but these serves, though it may have no room or be set aside."""
        found = self._generators.items()
        return any(name not in names and known.serving and known.report is not None for name, known in found)

    def _candidates(self, avoid: Collection[str]) -> list[str]:
        now = self._clock()
        found = self._generators.items()
        return [name for name, known in found if name not in avoid and known.is_usable(now) and known.has_room]

    def _has(self, name: str, accepts: Callable[[int], bool]) -> bool:
        report = self._generators[name].report
        return report is not None and any(map(accepts, report.versions))

    def sent(self, name: str, prefixes: Iterable[str]) -> None:
        """A request goes to a generator, which holds its prefixes from now on."""
        known = self._generators.get(name)
        if known is None:
            return
        known.outstanding += 1
        for prefix in prefixes:
            self._holders[prefix] = name
            self._holders.move_to_end(prefix)
        while len(self._holders) > _MAX_HOLDERS:
            self._holders.popitem(last=False)

    def gave_tokens(self, name: str) -> None:
        known = self._generators.get(name)
        if known is not None:
            known.aways = known.faults = 0

    def ended(self, name: str, trouble: Trouble | None = None) -> None:
        """A request is no longer at a generator; why, if its reply is not finished."""
        known = self._generators.get(name)
        if known is None:
            return
        known.outstanding = max(0, known.outstanding - 1)
        now = self._clock()
        # Requests that fail together are one failure: only what fails after a pause makes the next one longer.
        fresh = now >= known.aside_until
        if trouble is Trouble.FULL:
            known.limit.refused(known.outstanding + 1)
        elif trouble is Trouble.AWAY and fresh:
            known.aways += 1
            self._set_aside(known, known.aways, now)
        elif trouble is Trouble.FAULT and fresh:
            known.faults += 1
            if known.faults >= _MAX_FAULTS:
                self._set_aside(known, known.faults - _MAX_FAULTS + 1, now)

    def _set_aside(self, known: _Generator, times: int, now: float) -> None:
        pause = min(_LONGEST_ASIDE_S, _FIRST_ASIDE_S * 2.0 ** min(times - 1, 16))
        known.aside_until = now + pause * self._chance.uniform(0.5, 1.0)

    def standings(self) -> list[Standing]:
        now = self._clock()
        return [
            Standing(
                name,
                known.serving and known.report is not None,
                known.serving and known.report is not None and not known.is_usable(now),
                known.outstanding,
                known.limit.value,
            )
            for name, known in self._generators.items()
        ]

    def next_pause_end(self) -> float | None:
        """Seconds until the next generator that is set aside may be tried again."""
        now = self._clock()
        suspects = (known for known in self._generators.values() if known.is_suspect and known.serving)
        pauses = [known.aside_until - now for known in suspects if known.aside_until > now]
        return min(pauses, default=None)

    def room(self, name: str) -> int:
        """Requests that a generator may have beside those that it has."""
        known = self._generators.get(name)
        return 0 if known is None or not known.has_room else known.limit.value - known.outstanding
