"""Stragglers: what a heavy tail of rollout durations costs the asynchronous learner, and a synchronous loop.

    python benchmarks/stragglers.py [--quick] [--json FILE]

Rollout durations are lognormal (sigma 1.0 and 1.5, mean fixed), on 64 slots, with 256 rollouts a train step. Only the
durations are simulated: a private broker, two actor processes with the real Runner, and the real learner loop with its
ledger, records and checkpoints work over the real protocol; the train step sleeps for 3/4 of the time that 64 slots
need for a batch. Time is scaled (a mean of 0.5 s; 0.2 s with --quick), which makes every fixed cost weigh more.

The fluid limit is min(slots / mean duration, batch / step time): no slot ever idle, no step ever late. "Throughput" is
rollouts consumed per second in the steady state. The synchronous loop is the same code with target_staleness 0: it
issues one batch, waits for all of it, trains, and only then issues the next.

What makes the limit reachable: groups of 8 and target_staleness 3. A group closes only when all of its tickets are
terminal (law 6), so the seven quick ones of a group take places in admission until the slowest is home, and so does
what is being trained on. By Little's law a batch's worth of tickets per batch time waits for its group about as long as
the slowest of 8 lasts (3 means at sigma 1.0, 4 to 5 at sigma 1.5): with 64 slots some 200 to 300 tickets beside the 64
that run, and one batch more that is collected or trained on. 512 places (target_staleness 1) are too few for all that,
and slots stand idle; 768 just do; 1024 leave room. Groups of 16 need the 1024. More places change nothing: tickets
wait in order and get their policy version only when they are started, so staleness settles at what the tail makes it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.common_broker import PrivateBroker
from benchmarks.stragglers_learner import Learned, learn
from benchmarks.stragglers_load import Course, Load, Watch, long_tasks, share, simulate
from benchmarks.stragglers_site import Site
from longshore.telemetry.log import configure_logging
from longshore.types import JobRef

SIGMAS = (1.0, 1.5)
BATCH, GROUP_SIZE, SLOTS, TARGET_STALENESS = 256, 8, 64, 3
TRAIN_SHARE = 0.75
FLUID_GOAL = 0.92
SYNCHRONOUS_GOAL = {1.0: 2.3, 1.5: 3.5}
TICKETS = 100_000
# Mean duration in the run that is there for its number of tickets.
FAST_S = 0.002
# Steps of a predicted run.
MODEL_STEPS = 30


@dataclass(frozen=True)
class Ran:
    """One run on real services."""

    load: Load
    learned: Learned
    # Start and end of every attempt, on the monotonic clock.
    attempts: list[tuple[float, float]]

    @property
    def course(self) -> Course:
        return self.learned.course

    @property
    def steady_throughput(self) -> float:
        return self.course.throughput(*self.load.steady_steps, self.load.batch)

    @property
    def whole_throughput(self) -> float:
        """From the first ticket to the last step's end: what a loop of separate batches comes to."""
        return self.load.tickets / (self.course.ended[-1] - self.learned.began)

    @property
    def busy(self) -> float:
        """Share of the slots' time in the steady state in which an attempt ran."""
        first, last = (self.course.ended[step - 1] for step in self.load.steady_steps)
        worked = sum(max(0.0, min(end, last) - max(start, first)) for start, end in self.attempts)
        return worked / (self.load.slots * (last - first))


def load_of(sigma: float, mean_s: float, steps: int, target_staleness: int = TARGET_STALENESS) -> Load:
    """The benchmark's load; the seed is fixed."""
    train_s = TRAIN_SHARE * BATCH * mean_s / SLOTS
    return Load(sigma, mean_s, SLOTS, GROUP_SIZE, BATCH // GROUP_SIZE, target_staleness, train_s, steps)


async def run(load: Load) -> Ran:
    """Runs a load on a broker and a site of its own, until every ticket has ended."""
    job = JobRef("default", "stragglers")
    with PrivateBroker() as server, tempfile.TemporaryDirectory(prefix="ls-stragglers-") as folder:
        with Site(server.url, job, load, Path(folder)) as site:
            learned = await learn(load, server.url, job, Path(folder), site.version_file)
        return Ran(load, learned, site.attempts())


async def measure(report: common.Report, args: argparse.Namespace) -> None:
    configure_logging("learner", "benchmark", "error")
    mean_s, steps, synchronous_steps = (0.2, 12, 2) if args.quick else (0.5, 40, 8)
    _predict(report)
    report.note("the synchronous loops, both at a time: they leave the machine idle")
    synchronous = await asyncio.gather(*(run(load_of(sigma, mean_s, synchronous_steps, 0)) for sigma in SIGMAS))
    for sigma, compared in zip(SIGMAS, synchronous, strict=True):
        report.note(f"sigma {sigma}: {steps} steps of the asynchronous learner")
        ran = await run(load_of(sigma, mean_s, steps))
        _throughput(report, sigma, ran, compared)
        _staleness(report, sigma, ran.course)
        _fairness(report, sigma, ran)
        _invariant(report, f"sigma {sigma}", ran.learned.watch)
    await _many_tickets(report, args.quick)


def _predict(report: common.Report) -> None:
    """What admission allows if nothing but durations took time: why the settings are what they are."""
    for sigma in SIGMAS:
        for group_size, target in ((8, 0), (8, 1), (8, 2), (8, 3), (16, 2), (16, 3)):
            load = dataclasses.replace(
                load_of(sigma, 1.0, MODEL_STEPS, target), group_size=group_size, groups_per_step=BATCH // group_size
            )
            course = simulate(load)
            report.add(
                f"predicted, sigma {sigma}: groups of {group_size}, target_staleness {target}",
                course.throughput(*load.steady_steps, load.batch) / load.fluid,
                "x",
                against=f"the fluid limit; staleness {_mean(course.staleness):.1f} on average",
            )


def _throughput(report: common.Report, sigma: float, ran: Ran, synchronous: Ran) -> None:
    load = ran.load
    report.add(
        f"sigma {sigma}: rollouts consumed",
        ran.steady_throughput,
        "1/s",
        against=f"mean {load.mean_s} s, train step {load.train_s:g} s, groups of {load.group_size}, "
        f"target_staleness {load.target_staleness}",
    )
    report.add(
        f"sigma {sigma}: of the fluid limit",
        ran.steady_throughput / load.fluid,
        "x",
        against=f"min({load.slots} / mean, {load.batch} / step) = {load.fluid:.0f}/s",
        at_least=FLUID_GOAL,
    )
    report.add(f"sigma {sigma}: slots at work", ran.busy, "", against="1: never idle in the steady state")
    report.add(
        f"sigma {sigma}: of a synchronous loop",
        ran.steady_throughput / synchronous.whole_throughput,
        "x",
        against=f"{synchronous.load.steps} batches, {synchronous.whole_throughput:.1f}/s",
        at_least=SYNCHRONOUS_GOAL[sigma],
    )


def _staleness(report: common.Report, sigma: float, course: Course) -> None:
    found = course.staleness
    report.add(f"sigma {sigma}: staleness, mean", _mean(found), "versions", against=f"{len(found):,} rollouts")
    for portion in (0.5, 0.9, 0.99):
        report.add(f"sigma {sigma}: staleness, p{portion * 100:.0f}", common.percentile(found, portion), "versions")
    report.add(f"sigma {sigma}: staleness, highest", max(found), "versions")


def _fairness(report: common.Report, sigma: float, ran: Ran) -> None:
    """Long tasks are neither starved nor dropped."""
    long = long_tasks(ran.load.durations())
    trained = [number for step in ran.course.trained for number in step]
    issued = share(long, range(ran.load.tickets))
    report.add(
        f"sigma {sigma}: long tasks trained / issued - 1",
        abs(share(long, trained) / issued - 1),
        against=f"{len(set(trained)):,} of {ran.load.tickets:,} tickets trained, {ran.learned.counts.issued:,} issued",
        at_most=0.01,
    )


def _invariant(report: common.Report, what: str, watch: Watch) -> None:
    report.add(
        f"{what}: issued - consumed above its limit",
        watch.broken,
        "times",
        against=f"{watch.issued:,} tickets, {watch.looks:,} looks, highest {watch.highest:,} of {watch.limit:,}",
        at_most=0,
    )


async def _many_tickets(report: common.Report, quick: bool) -> None:
    """Law 6 over a hundred thousand tickets."""
    steps = math.ceil(TICKETS / BATCH)
    report.note(f"{steps * BATCH:,} tickets on a simulated clock")
    load = load_of(1.5, 1.0, steps)
    watch = Watch(load.limit)
    simulate(load, watch)
    _invariant(report, "real Admission and Ledger, simulated clock", watch)
    if quick:
        report.skip("real services: issued - consumed above its limit", "not with --quick", "<= 0")
        return
    report.note(f"{steps * BATCH:,} tickets on real services, as fast as they go")
    fast = dataclasses.replace(load_of(1.0, FAST_S, steps), train_s=0.0)
    ran = await run(fast)
    _invariant(report, "real services", ran.learned.watch)
    report.add(
        "real services: rollouts consumed, durations near 0",
        ran.whole_throughput,
        "1/s",
        against="broker, two actors and the learner on this machine",
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(common.run(__doc__, measure))
