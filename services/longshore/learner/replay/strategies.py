"""The choices of replay, each a small pure function, by the names that the JobSpec has for them.

priority    entry, moment -> weight > 0: groups are drawn without replacement with chances proportional to it
admit       entry, moment -> whether a group that was just trained on is kept
evict       entry, moment -> the lowest goes first when there is no room
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from longshore.config_replay import Admit, Evict, Priority
from longshore.learner.replay.entry import Entry

# No group's chance is nothing: priorities are guesses.
LEAST = 0.05


@dataclass(frozen=True)
class Moment:
    """What a choice depends on besides the group itself."""

    # Of the weights before the train step.
    version: int
    max_age: int
    # The task's estimated rate of success; for one that nothing is known of, its group's own.
    success: Callable[[Entry], float]


Weight = Callable[[Entry, Moment], float]


def uniform(_: Entry, __: Moment) -> float:
    """1: every group alike."""
    return 1.0


def recency(entry: Entry, moment: Moment) -> float:
    """1 - age / (max_age + 1): from 1 for tokens of the present version down to a little above nothing."""
    return max(LEAST, 1.0 - entry.age(moment.version) / (moment.max_age + 1))


def advantage(entry: Entry, _: Moment) -> float:
    """The spread of the group's rewards: what its advantages come to."""
    return max(LEAST, entry.magnitude)


def difficulty(entry: Entry, moment: Moment) -> float:
    """1 - p of its task: what mostly fails is seen more often."""
    return max(LEAST, 1.0 - moment.success(entry))


PRIORITIES: Mapping[Priority, Weight] = {
    "uniform": uniform,
    "recency": recency,
    "advantage": advantage,
    "difficulty": difficulty,
}


def signal(_: Entry, __: Moment) -> bool:
    """Every group that had a gradient; others are never offered."""
    return True


def hard(entry: Entry, moment: Moment) -> bool:
    """Those whose task fails at least every other time."""
    return moment.success(entry) <= 0.5


def young(entry: Entry, moment: Moment) -> bool:
    """Those with at least half of their time still before them."""
    return 2 * entry.age(moment.version) <= moment.max_age


ADMISSIONS: Mapping[Admit, Callable[[Entry, Moment], bool]] = {"signal": signal, "hard": hard, "young": young}


def oldest(entry: Entry, _: Moment) -> float:
    """By the version of the oldest token."""
    return float(entry.min_version)


def most_used(entry: Entry, _: Moment) -> float:
    """What was trained on most often goes first."""
    return -float(entry.uses)


def evictions(evict: Evict, priority: Priority) -> Weight:
    """The order of eviction; `least-priority` is that of the chances to be drawn."""
    orders: Mapping[Evict, Weight] = {
        "oldest": oldest,
        "most-used": most_used,
        "least-priority": PRIORITIES[priority],
    }
    return orders[evict]


def age_weight(age: int, half_life: float | None) -> float:
    """What a replayed token's loss is multiplied by: 2^(-age / half_life); 1 without a half-life.

    Example: age_weight(64, 32.0) == 0.25
    """
    return 1.0 if half_life is None else 2.0 ** (-age / half_life)


def drawn(entries: Iterable[Entry], weight: Callable[[Entry], float], seed: str) -> list[Entry]:
    """All entries in a random order: the first k of it are k draws without replacement by weight.

    Each gets the key log(u) / weight for a number u in (0, 1) that depends on the seed and its group alone
    (Efraimidis and Spirakis, 2006); the largest key is first. The same entries, weights and seed give the same order.
    """

    def key(entry: Entry) -> tuple[float, int]:
        return -math.log(_unit(f"{seed}/{entry.group_id}")) / weight(entry), entry.group_id

    return sorted(entries, key=key)


def _unit(text: str) -> float:
    """A number in (0, 1) from a text."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") + 0.5) / 2**48
