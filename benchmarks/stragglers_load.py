"""The load of benchmarks/stragglers.py, and what should come of it: durations, a simulated clock, statistics.

No clock, no broker, no process. `simulate` runs the learner's real Admission and Ledger against simulated slots.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from longshore.learner.admission import Admission
from longshore.learner.groups import Origin
from longshore.learner.ledger import TRAINED, Ledger
from longshore.types import (
    EngineFingerprint,
    FinishReason,
    GivenSpan,
    JobRef,
    Message,
    Purpose,
    Rollout,
    SampledSpan,
    Sampling,
    Segment,
    Task,
    TicketRef,
    Turn,
    Verdict,
)

# A task is called long when it takes longer than this share of all tasks.
LONG_SHARE = 0.9
_PROMPT, _REPLY = (5, 6, 7, 2), (10, 11, 12, 13, 14, 15, 16, 1)
_TURNS = (Turn("0", len(_PROMPT), len(_REPLY), FinishReason.STOP),)
_ENGINES = (EngineFingerprint("simulated", "1", "float32", ""),)
_VERDICTS = (Verdict(0.0, "simulated@1"), Verdict(1.0, "simulated@1"))


@dataclass(frozen=True)
class Load:
    """One run: `steps` train steps over tickets whose durations only the seed decides. Times in seconds.

    Example: Load(sigma=1.0, mean_s=0.5, slots=64, group_size=8, groups_per_step=32, target_staleness=7, train_s=1.5,
    steps=40)
    """

    sigma: float
    mean_s: float
    slots: int
    group_size: int
    groups_per_step: int
    target_staleness: int
    train_s: float
    steps: int
    seed: int = 0

    @property
    def batch(self) -> int:
        """Rollouts a train step."""
        return self.group_size * self.groups_per_step

    @property
    def tickets(self) -> int:
        return self.steps * self.batch

    @property
    def limit(self) -> int:
        """Law 6: the most that may be issued and not consumed."""
        return (self.target_staleness + 1) * self.batch

    @property
    def fluid(self) -> float:
        """Rollouts a second when no slot is ever idle and no step ever waits, whichever of the two is slower."""
        generation = self.slots / self.mean_s if self.mean_s else math.inf
        return min(generation, self.batch / self.train_s if self.train_s else math.inf)

    @property
    def steady_steps(self) -> tuple[int, int]:
        """First and last step of the steady state: behind the start, before the last tickets were issued."""
        first = max(1, min(self.target_staleness + 1, self.steps // 4))
        return first, max(first + 1, self.steps - self.target_staleness - 1)

    def durations(self) -> list[float]:
        """Seconds of each ticket in the order of issue: lognormal, and scaled so that their mean is `mean_s` exactly.

        A sample's own mean would wander by several per cent, and the limit that is compared with would be wrong by it.
        """
        draws = lognormals(self.sigma, self.tickets, self.seed)
        scale = self.mean_s * len(draws) / math.fsum(draws)
        return [draw * scale for draw in draws]

    def number(self, ref: TicketRef) -> int:
        """A ticket's place in the order of issue."""
        return ref.group_id * self.group_size + ref.index


def lognormals(sigma: float, count: int, seed: int) -> list[float]:
    """Draws of a lognormal distribution with mean 1."""
    source = random.Random(f"{seed}/{sigma}")
    return [source.lognormvariate(-sigma * sigma / 2, sigma) for _ in range(count)]


def long_tasks(durations: Sequence[float]) -> set[int]:
    """Numbers of the tickets whose durations are above the 90th percentile."""
    threshold = sorted(durations)[math.ceil(LONG_SHARE * len(durations)) - 1]
    return {number for number, duration in enumerate(durations) if duration > threshold}


def share(of: Collection[int], among: Collection[int]) -> float:
    """The share of `among` that is in `of`. Raises ValueError when there is nothing."""
    if not among:
        raise ValueError("nothing to take a share of")
    return sum(number in of for number in among) / len(among)


@dataclass
class Watch:
    """The invariant of law 6, looked at whenever anything is issued or consumed, by counts of its own."""

    limit: int
    issued: int = 0
    consumed: int = 0
    looks: int = 0
    broken: int = 0
    highest: int = 0

    def issue(self, count: int) -> None:
        self.issued += count
        self._look()

    def consume(self, count: int) -> None:
        self.consumed += count
        self._look()

    def _look(self) -> None:
        out = self.issued - self.consumed
        self.looks += 1
        self.highest = max(self.highest, out)
        self.broken += not 0 <= out <= self.limit


@dataclass
class Course:
    """What happened in a run: when each step ended (seconds), and how stale each rollout was when it was consumed."""

    ended: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    # Tickets of each step, by number.
    trained: list[list[int]] = field(default_factory=list)

    def throughput(self, first: int, last: int, batch: int) -> float:
        """Rollouts consumed per second between the ends of two steps (from 1). Raises ValueError for an empty span."""
        span = self.ended[last - 1] - self.ended[first - 1]
        if last <= first or span <= 0:
            raise ValueError(f"no time between steps {first} and {last}")
        return (last - first) * batch / span


def make_rollout(ref: TicketRef, task_id: str, version: int, temperature: float = 1.0, attempt: int = 1) -> Rollout:
    """A small rollout of a ticket. Every group has both rewards, so that all of it is trained on."""
    return Rollout(
        ref=ref,
        attempt=attempt,
        purpose=Purpose.TRAIN,
        task_id=task_id,
        segments=(_segment(version),),
        turns=_TURNS,
        sampling=(Sampling(temperature, 16),),
        engines=_ENGINES,
        finish=FinishReason.STOP,
        started_at=1.0,
        finished_at=2.0,
        site="home",
        actor="simulated",
        verdicts=(_VERDICTS[ref.index % 2],),
    )


@functools.lru_cache(maxsize=16)
def _segment(version: int) -> Segment:
    span = SampledSpan(version, tuple(-1.0 for _ in _REPLY))
    return Segment("0", _PROMPT + _REPLY, (GivenSpan(len(_PROMPT)), span))


class _Simulation:
    """Slots and a learner on a simulated clock, around the real books."""

    def __init__(self, load: Load, watch: Watch) -> None:
        self._load = load
        self._watch = watch
        self._durations = load.durations()
        self._admission = Admission(load.groups_per_step, load.target_staleness, load.group_size)
        self._ledger = Ledger()
        self._now, self._version = 0.0, 0
        self._queue: deque[int] = deque()
        # (when, order, what to do): the order keeps what happens at one moment in the order of its planning.
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = self._busy = 0
        self._training = False
        self.course = Course()

    def run(self) -> Course:
        """Until the last step has been taken."""
        self._issue()
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act()
        assert self._ledger.balanced
        return self.course

    def _plan(self, delay: float, act: Callable[[], None]) -> None:
        self._planned += 1
        heapq.heappush(self._events, (self._now + delay, self._planned, act))

    def _issue(self) -> None:
        steps_left = self._load.steps - len(self.course.ended)
        task = Task("0", (Message("user", "?"),))
        for _ in range(self._admission.allowance(steps_left, self._ledger.num_active)):
            group = self._ledger.issue(task, Purpose.TRAIN, self._load.group_size)
            first = group.group_id * group.size
            self._queue.extend(range(first, first + group.size))
            self._watch.issue(group.size)
        self._start()

    def _start(self) -> None:
        while self._queue and self._busy < self._load.slots:
            self._busy += 1
            number, version = self._queue.popleft(), self._version
            self._plan(self._durations[number], functools.partial(self._finish, number, version))

    def _finish(self, number: int, version: int) -> None:
        self._busy -= 1
        ref = TicketRef(JobRef("default", "simulated"), *divmod(number, self._load.group_size))
        self._ledger.receive(make_rollout(ref, "0", version), Origin(str(number)))
        self._start()
        self._train()

    def _train(self) -> None:
        if self._training or self._ledger.num_ready < self._load.groups_per_step:
            return
        self._training = True
        groups = self._ledger.take_ready(self._load.groups_per_step)
        version = self._version

        def end() -> None:
            self._training = False
            rollouts = [rollout for group in groups for _, rollout in group.members]
            self.course.ended.append(self._now)
            self.course.staleness += [version - rollout.min_version for rollout in rollouts]
            self.course.trained.append([self._load.number(rollout.ref) for rollout in rollouts])
            for group in groups:
                self._ledger.settle(group, TRAINED)
            self._version += 1
            self._watch.consume(len(rollouts))
            self._issue()
            self._train()

        self._plan(self._load.train_s, end)


def simulate(load: Load, watch: Watch | None = None) -> Course:
    """What the run would be if nothing but the slots, the train steps and admission took time."""
    return _Simulation(load, watch or Watch(load.limit)).run()
