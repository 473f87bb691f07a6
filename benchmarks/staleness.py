"""Learning from late rollouts: samples to a target at a forced staleness of 0, 16, 64 and 256 versions.

In one process a run, with the learner's own credit, objectives and train step (staleness_world.py): every batch is
drawn from the policy as it was so many versions ago; at 256 the first 256 batches all come from version 0. Batches are
of one size, so that train steps stand for samples. Every
candidate has its defaults and the same learning rate, schedule, batches and seeds: none of them is tuned. Staleness in
versions means nothing without the rate at which versions move apart, so KL and ESS are shown beside it. A task whose
on-policy runs reach their target in fewer than 1024 train steps is void. Intervals: 90 %, bootstrap over the seeds.

    python benchmarks/staleness.py [--quick] [--json FILE] [--plot FILE] [--curves FILE] [--only NAME,NAME]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import Report, parser, run
from benchmarks.staleness_world import GAMES, Game, Setting, World
from longshore.config import TrainSpec

STALENESS = (0, 16, 64, 256)
SEEDS = 5
MIN_STEPS = 1024
STEPS = 3072
# What is compared: a name in the table, and what a JobSpec's `train` says.
CANDIDATES: dict[str, dict[str, Any]] = {
    "clip": {"objective": "clip", "advantage": "group-mean-std"},
    "tis": {"objective": "reinforce"},
    "m2po": {"objective": "m2po"},
    "vespo": {"objective": "vespo"},
    "oapl": {"objective": "oapl"},
    "default": {},
    "kimi": {"objective": "kimi"},
    "default + ess": {"ess_step": {}},
    "tis + vcpo": {"objective": "reinforce", "ess_step": {}, "optimal_baseline": "group"},
}
QUICK_CANDIDATES = ("clip", "default")
GOALS = {64: 1.15, 256: 1.5}
MAX_LOSS = 0.02


@dataclass(frozen=True)
class Plan:
    """What is run."""

    games: Sequence[str]
    candidates: Sequence[str]
    staleness: Sequence[int]
    seeds: int
    steps: int
    min_steps: int
    # Of each task's learning rate.
    rate: float


@dataclass(frozen=True)
class Run:
    """One run, and what came of it."""

    game: str
    candidate: str
    staleness: int
    seed: int
    # Train steps to the target; None: not within the run.
    steps_to: int | None
    final: float
    course: dict[str, Any]


def train_spec(candidate: str, game: Game, plan: Plan) -> TrainSpec:
    """The `train` part of a candidate's JobSpec."""
    return TrainSpec.model_validate(
        {
            "steps": plan.steps,
            "groups_per_step": 8,
            "group_size": 8,
            "learning_rate": game.learning_rate * plan.rate,
            "warmup_steps": min(32, plan.steps),
            **CANDIDATES[candidate],
        }
    )


def one(game: str, candidate: str, staleness: int, seed: int, plan: Plan) -> Run:
    """Runs one in this process."""
    torch.set_num_threads(1)
    (found,) = [item for item in GAMES if item.name == game]
    course = World(Setting(found, train_spec(candidate, found, plan), staleness, seed)).run()
    return Run(game, candidate, staleness, seed, course.steps_to(found.target), course.final(), asdict(course))


def all_runs(plan: Plan, note: Callable[[str], None], processes: int) -> list[Run]:
    """Every run of the plan, some at a time."""
    jobs = [
        (game, candidate, staleness, seed, plan)
        for game in plan.games
        for staleness in plan.staleness
        for seed in range(plan.seeds)
        for candidate in plan.candidates
    ]
    runs: list[Run] = []
    with futures.ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in futures.as_completed([pool.submit(one, *job) for job in jobs]):
            made = done.result()
            runs.append(made)
            reached = "never" if made.steps_to is None else str(made.steps_to)
            note(
                f"{len(runs)}/{len(jobs)} {made.game}, {made.candidate}, staleness {made.staleness}, seed {made.seed}: "
                f"target at step {reached}, final {made.final:.3f}, {made.course['seconds']:.0f} s"
            )
    return runs


def interval(values: Sequence[float], statistic: Callable[[Sequence[float]], float]) -> tuple[float, float]:
    """90 % percentile bootstrap interval of a statistic, from 2000 draws with a fixed seed."""
    draw = random.Random(0)
    made = sorted(statistic([draw.choice(values) for _ in values]) for _ in range(2000))
    return made[round(0.05 * (len(made) - 1))], made[round(0.95 * (len(made) - 1))]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def chosen(runs: Sequence[Run], game: str, candidate: str, staleness: int) -> list[Run]:
    picked = [run for run in runs if (run.game, run.candidate, run.staleness) == (game, candidate, staleness)]
    return sorted(picked, key=lambda run: run.seed)


def samples(runs: Sequence[Run], plan: Plan) -> list[float]:
    """Train steps to the target by seed; a run that did not get there counts with its whole length: a lower bound."""
    return [float(plan.steps if run.steps_to is None else run.steps_to) for run in runs]


def judge(report: Report, runs: Sequence[Run], plan: Plan) -> None:
    """One row a task, candidate and staleness, against the best candidate on-policy."""
    for game in plan.games:
        on_policy = {name: mean(samples(chosen(runs, game, name, 0), plan)) for name in plan.candidates}
        best = min(on_policy, key=lambda name: on_policy[name])
        if on_policy[best] < plan.min_steps:
            why = (
                f"void: {best} needs {on_policy[best]:.0f} train steps on-policy, at least {plan.min_steps} are wanted"
            )
            report.skip(game, why)
            continue
        best_final = mean([run.final for run in chosen(runs, game, best, 0)])
        for candidate in plan.candidates:
            for staleness in plan.staleness:
                _row(report, chosen(runs, game, candidate, staleness), plan, (best, on_policy[best], best_final))


def _row(report: Report, picked: Sequence[Run], plan: Plan, best: tuple[str, float, float]) -> None:
    first = picked[0]
    ratios = [value / best[1] for value in samples(picked, plan)]
    low, high = interval(ratios, mean)
    missed = sum(run.steps_to is None for run in picked)
    last = [run.final for run in picked]
    told = {name: mean([mean(run.course[name]) for run in picked]) for name in ("kl", "ess")}
    name = f"{first.game}, {first.candidate}, staleness {first.staleness}: samples to target"
    against = (
        f"{best[0]} on-policy ({best[1]:.0f} train steps); 90 %: {low:.2f} to {high:.2f}; {missed} of {len(picked)} "
        f"never; final reward {mean(last):.3f} (there {best[2]:.3f}); KL {told['kl']:.4f}, ESS {told['ess']:.2f}"
    )
    goal = GOALS.get(first.staleness) if first.candidate == "default" and len(plan.candidates) > 1 else None
    report.add(name, mean(ratios), "x", against=against, at_most=goal)
    if goal is not None:
        name = f"{first.game}, {first.candidate}, staleness {first.staleness}: final reward below on-policy"
        report.add(name, best[2] - mean(last), at_most=MAX_LOSS)


def draw(path: Path, runs: Sequence[Run], plan: Plan) -> None:
    """Reward by train step, a panel a task and staleness, a line a candidate (mean of the seeds)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(plan.games),
        len(plan.staleness),
        figsize=(3.6 * len(plan.staleness), 2.8 * len(plan.games)),
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    for row, game in zip(panels, plan.games, strict=True):
        for panel, staleness in zip(row, plan.staleness, strict=True):
            for candidate in plan.candidates:
                courses = [run.course for run in chosen(runs, game, candidate, staleness)]
                rewards = [mean(values) for values in zip(*[course["rewards"] for course in courses], strict=True)]
                panel.plot(courses[0]["steps"], rewards, linewidth=1.2, label=candidate)
            panel.set(title=f"{game}, {staleness} versions old", xlabel="train step", ylim=(0, 1))
            panel.grid(alpha=0.25)
    panels[0][0].set(ylabel="reward of the current policy")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    names = args.only.split(",") if args.only else list(QUICK_CANDIDATES if args.quick else CANDIDATES)
    unknown = sorted(set(names) - set(CANDIDATES))
    if unknown:
        raise SystemExit(f"--only: {', '.join(unknown)} is not among {', '.join(CANDIDATES)}")
    if args.quick:
        # Far fewer steps, on an easier task, than a judgement takes: it shows that everything runs.
        return Plan(("pair",), names, (0, 16), 1, 192, 0, 1.0)
    return Plan(("sort", "sums"), names, STALENESS, args.seeds, STEPS, MIN_STEPS, args.rate)


async def measure(report: Report, args: argparse.Namespace) -> None:
    plan = plan_of(args)
    runs = all_runs(plan, report.note, args.processes)
    judge(report, runs, plan)
    if args.curves is not None:
        args.curves.write_text(json.dumps([asdict(run) for run in runs]) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(args.plot, runs, plan)


def main() -> int:
    assert __doc__ is not None
    made = parser(__doc__)
    made.add_argument("--only", metavar="NAMES", help=f"some of: {', '.join(CANDIDATES)}")
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--rate", type=float, default=1.0, help="factor of each task's learning rate")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as a picture")
    made.add_argument("--curves", type=Path, metavar="FILE", help="write every run's curve as JSON")
    return run(__doc__, measure, made=made)


if __name__ == "__main__":
    raise SystemExit(main())
