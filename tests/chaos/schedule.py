"""What is done to whom and when: a pure function of the seed, decided before anything starts.

Knows names of processes and nothing of how they are killed. The same arguments always give the same schedule.
"""

from __future__ import annotations

import enum
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


class Kind(enum.Enum):
    """What can be done. The first three end a process with SIGKILL, and count as kills."""

    KILL = "kill"
    # The broker is killed, and comes back without the last second of what it was told.
    TAIL_LOSS = "tail loss"
    # The supervisor is killed, and with it every process of the machine; then it is started again.
    MACHINE = "machine"
    STOP = "stop"
    PARTITION = "partition"
    DISK_FULL = "disk full"


KILLS = frozenset({Kind.KILL, Kind.TAIL_LOSS, Kind.MACHINE})
# Most of all kills that may be the learner's.
LEARNER_SHARE = 0.15
LEARNER = "learner"
SUPERVISOR = "supervisor"


@dataclass(frozen=True)
class Target:
    """A process, and how much of each kind it gets beside the others.

    Example: Target("actor-0", kills=8, stops=2)
    """

    name: str
    kills: float
    stops: float = 0.0
    # Share of its kills after which it comes back without its last second.
    tail_losses: float = 0.0
    # Whether it is a supervisor, with which everything on its machine dies.
    machine: bool = False


@dataclass(frozen=True)
class Place:
    """Something other than a process that can fail: a link or a disk.

    Example: Place("link west", Kind.PARTITION, per_100_kills=4, seconds=(5, 25))
    """

    name: str
    kind: Kind
    per_100_kills: float
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Fault:
    """One thing that is done. `seconds`: how long a stop, a partition or a full disk lasts."""

    number: int
    at_s: float
    kind: Kind
    target: str
    seconds: float = 0.0


# A stopped process must sometimes outlast its lease, and sometimes not.
STOP_SECONDS = (1.0, 9.0)
STOPS_PER_100_KILLS = 16.0
# The next of the same target comes after at least so many others, where there are enough others.
APART = 3


def plan(seed: int, kills: int, targets: Sequence[Target], places: Sequence[Place], pace_s: float) -> list[Fault]:
    """The schedule: exactly `kills` kills, about `pace_s` seconds apart, and stops and places in between.

    At most LEARNER_SHARE of the kills are the learner's. Raises ValueError when there is nobody else to kill.
    """
    source = random.Random(seed)
    faults = _kills(kills, targets)
    stops = apportion(round(kills * STOPS_PER_100_KILLS / 100), {target.name: target.stops for target in targets})
    faults += [(Kind.STOP, name, STOP_SECONDS) for name, count in stops.items() for _ in range(count)]
    for place in places:
        faults += [(place.kind, place.name, place.seconds)] * round(kills * place.per_100_kills / 100)
    source.shuffle(faults)
    return _timed(source, _spread([Fault(0, 0.0, kind, name, source.uniform(*s)) for kind, name, s in faults]), pace_s)


def _kills(kills: int, targets: Sequence[Target]) -> list[tuple[Kind, str, tuple[float, float]]]:
    counts = apportion(kills, {target.name: target.kills for target in targets})
    most = math.floor(kills * LEARNER_SHARE)
    surplus = max(0, counts.get(LEARNER, 0) - most)
    if surplus:
        counts[LEARNER] = most
        others = {target.name: target.kills for target in targets if target.name != LEARNER}
        for name, more in apportion(surplus, others).items():
            counts[name] += more
    found = []
    for target in targets:
        count = counts[target.name]
        lost = round(count * target.tail_losses)
        plain = Kind.MACHINE if target.machine else Kind.KILL
        found += [(Kind.TAIL_LOSS, target.name, (0.0, 0.0))] * lost
        found += [(plain, target.name, (0.0, 0.0))] * (count - lost)
    return found


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`total` shared out by weight, by largest remainder. Raises ValueError when no weight is above 0."""
    whole = math.fsum(weights.values())
    if total == 0:
        return dict.fromkeys(weights, 0)
    if whole <= 0:
        raise ValueError("nothing has a weight")
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _spread(faults: list[Fault]) -> list[Fault]:
    """The same faults in an order in which no target comes again within APART, where that can be had."""
    rest, ordered = list(faults), list[Fault]()
    while rest:
        recent = {fault.target for fault in ordered[-APART:]}
        at = next((index for index, fault in enumerate(rest) if fault.target not in recent), 0)
        ordered.append(rest.pop(at))
    return ordered


def _timed(source: random.Random, faults: list[Fault], pace_s: float) -> list[Fault]:
    """Kills follow each other by 0.3 to 1.7 times the pace; other things happen somewhere in between."""
    now, timed = 0.0, list[Fault]()
    for fault in faults:
        if fault.kind in KILLS:
            now += pace_s * source.uniform(0.3, 1.7)
            at = now
        else:
            at = now + pace_s * source.uniform(0.0, 0.3)
        timed.append(replace(fault, at_s=round(at, 3), seconds=round(fault.seconds, 3)))
    timed.sort(key=lambda fault: fault.at_s)
    return [replace(fault, number=number) for number, fault in enumerate(timed, 1)]


def mix(faults: Sequence[Fault]) -> dict[str, Counter[str]]:
    """How often each kind meets each target: target -> kind -> times."""
    table: dict[str, Counter[str]] = {}
    for fault in faults:
        table.setdefault(fault.target, Counter())[fault.kind.value] += 1
    return dict(sorted(table.items()))


def num_kills(faults: Sequence[Fault]) -> int:
    return sum(fault.kind in KILLS for fault in faults)


def targets_at_home() -> list[Target]:
    """What a job on one machine consists of."""
    return [
        Target("actor-0", kills=8, stops=2),
        Target("actor-1", kills=8, stops=2),
        Target("broker", kills=14, stops=2, tail_losses=0.5),
        Target("verifier-0", kills=7, stops=1),
        Target("generator-0", kills=6, stops=1),
        Target("weights", kills=6, stops=1),
        Target("gateway", kills=5, stops=1),
        Target(LEARNER, kills=10, stops=2),
        Target(SUPERVISOR, kills=2, machine=True),
    ]


def targets_at(site: str) -> list[Target]:
    """What a rollout site consists of; its own name stands for all of it at once."""
    return [
        Target(f"{site}-actor-0", kills=8, stops=2),
        Target(f"{site}-broker", kills=10, stops=1, tail_losses=0.5),
        Target(f"{site}-relay", kills=10, stops=2),
        Target(f"{site}-verifier-0", kills=4, stops=1),
        Target(f"{site}-generator-0", kills=4, stops=1),
        Target(site, kills=1, machine=True),
    ]
