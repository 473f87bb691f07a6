"""Learning from late rollouts: samples to a target at a forced staleness of 0, 16, 64 and 256 versions.

With the learner's own credit, objectives, schedule and replay (staleness_world.py): every batch is drawn from the
policy as it was so many versions ago; at 256 the first 256 batches all come from version 0. Batches are of one size, so
that train steps stand for samples. All candidates have the same learning rate, schedule, batches and seeds. Staleness
in versions means nothing without the rate at which versions move apart, so KL and ESS are shown beside it. A task whose
on-policy runs reach their target in fewer than 1024 train steps is void. Intervals: 90 %, bootstrap over the seeds.

    python benchmarks/staleness.py [--quick] [--json FILE] [--plot FILE] [--runs FILE] [--only NAME;NAME]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import Report, parser, run
from benchmarks.staleness_game import GAMES, Game
from benchmarks.staleness_plot import draw
from benchmarks.staleness_world import Job, Setting, World
from longshore.config import TrainSpec
from longshore.config_curriculum import CurriculumSpec

SEEDS = 5
MIN_STEPS = 1024
STEPS = 1920


@dataclass(frozen=True)
class Candidate:
    """What is compared: what a JobSpec says under `train`, and under `tasks.curriculum`."""

    train: Mapping[str, Any]
    staleness: tuple[int, ...] = (0, 16, 64, 256)
    curriculum: Mapping[str, Any] | None = None
    # On-policy it has the gradient of this one, whose runs count for both.
    on_policy: str = ""


CANDIDATES: Mapping[str, Candidate] = {
    "clip": Candidate({"objective": "clip", "advantage": "group-mean-std"}),
    "tis": Candidate({"objective": "reinforce"}),
    "m2po": Candidate({"objective": "m2po"}, on_policy="clip"),
    "vespo": Candidate({"objective": "vespo"}, on_policy="tis"),
    "oapl": Candidate({"objective": "oapl"}),
    "oapl, beta 1": Candidate({"objective": {"name": "oapl", "beta": 1.0}}),
    "dppo": Candidate({"objective": "dppo"}, on_policy="tis"),
    "topr": Candidate({"objective": "topr"}, on_policy="tis"),
    "topr, replay": Candidate({"objective": "topr", "replay": {"max_age": 256}}, (0, 64)),
    "topr, replay of half": Candidate({"objective": "topr", "replay": {"max_age": 256, "share": 0.5}}, (0, 64)),
    "topr, curriculum": Candidate({"objective": "topr"}, (0, 64), {}),
}
# What a job of such a target staleness has when it does not say otherwise.
DEFAULT = "topr"
QUICK_CANDIDATES = ("clip", "tis", DEFAULT)
GOALS = {64: 1.15, 256: 1.5}
MAX_LOSS = 0.02


@dataclass(frozen=True)
class Plan:
    """What is run."""

    games: Sequence[str]
    candidates: Sequence[str]
    # Only these, of each candidate's.
    staleness: Sequence[int] = (0, 16, 64, 256)
    seeds: int = SEEDS
    steps: int = STEPS
    min_steps: int = MIN_STEPS
    # Of each task's learning rate.
    rate: float = 1.0


@dataclass(frozen=True)
class Run:
    """One seed of one candidate, and what came of it."""

    game: str
    candidate: str
    staleness: int
    seed: int
    # Train steps to the target; None: not within the run.
    steps_to: int | None
    final: float
    course: dict[str, Any] = field(repr=False)


def job_of(candidate: str, staleness: Sequence[int], game: Game, plan: Plan) -> Job:
    """A candidate's runs of some staleness."""
    found = CANDIDATES[candidate]
    common = {"steps": plan.steps, "groups_per_step": 4, "group_size": 8, "warmup_steps": min(32, plan.steps)}
    train = TrainSpec.model_validate({**common, "learning_rate": game.learning_rate * plan.rate, **found.train})
    curriculum = None if found.curriculum is None else CurriculumSpec.model_validate(found.curriculum)
    return Job(train, tuple(staleness), curriculum)


def of_game(name: str, wanted: Sequence[tuple[str, Sequence[int]]], plan: Plan) -> list[Run]:
    """All seeds of these candidates, in this process and in step."""
    torch.set_num_threads(1)
    (game,) = [item for item in GAMES if item.name == name]
    seeds = tuple(range(plan.seeds))
    jobs = tuple(job_of(candidate, staleness, game, plan) for candidate, staleness in wanted)
    with tempfile.TemporaryDirectory() as folder:
        courses = World(Setting(game, jobs, seeds), Path(folder)).run()
    keys = [(candidate, age, seed) for candidate, staleness in wanted for age in staleness for seed in seeds]
    return [
        Run(name, *key, course.steps_to(game.target), course.final(), asdict(course))
        for key, course in zip(keys, courses, strict=True)
    ]


def wanted_of(game: str, plan: Plan, there: Sequence[Run]) -> list[tuple[str, list[int]]]:
    """What of a game is not there yet: the staleness of each candidate."""
    known = {(run.candidate, run.staleness) for run in there if run.game == game}
    wanted = []
    for candidate in plan.candidates:
        found = CANDIDATES[candidate]
        ages = [age for age in found.staleness if age in plan.staleness and (candidate, age) not in known]
        if found.on_policy in plan.candidates:
            ages = [age for age in ages if age]
        if ages:
            wanted.append((candidate, ages))
    return wanted


def all_runs(plan: Plan, note: Callable[[str], None], processes: int, kept: Path | None) -> list[Run]:
    """Every run of the plan, a process a game. What `kept` has of it is taken from there, the rest is added to it."""
    runs = kept_runs(kept, plan)
    wanted = {game: wanted_of(game, plan, runs) for game in plan.games}
    with futures.ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        going = [pool.submit(of_game, game, parts, plan) for game, parts in wanted.items() if parts]
        for done in futures.as_completed(going):
            made = done.result()
            runs += made
            note(f"{made[0].game}: {len(made)} runs")
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(run)) + "\n" for run in made)
    return runs


def kept_runs(path: Path | None, plan: Plan) -> list[Run]:
    """The runs of a file that are of this plan."""
    if path is None or not path.exists():
        return []
    runs = [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    fits = [run for run in runs if run.game in plan.games and run.candidate in plan.candidates]
    return [run for run in fits if run.course["steps"][-1] == plan.steps and run.seed < plan.seeds]


def interval(values: Sequence[float], statistic: Callable[[Sequence[float]], float]) -> tuple[float, float]:
    """90 % percentile bootstrap interval of a statistic, from 2000 draws with a fixed seed."""
    random_numbers = random.Random(0)
    made = sorted(statistic([random_numbers.choice(values) for _ in values]) for _ in range(2000))
    return made[round(0.05 * (len(made) - 1))], made[round(0.95 * (len(made) - 1))]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def mean_of_known(values: Sequence[float]) -> float:
    """Mean of those that are numbers: looks without a gradient have none."""
    known = [value for value in values if not math.isnan(value)]
    return mean(known) if known else math.nan


def chosen(runs: Sequence[Run], game: str, candidate: str, staleness: int) -> list[Run]:
    """The runs of a candidate by seed; on-policy, where it has none of its own, those of its like."""
    of_game = [run for run in runs if (run.game, run.staleness) == (game, staleness)]
    own = [run for run in of_game if run.candidate == candidate]
    if not own and not staleness:
        own = [run for run in of_game if run.candidate == CANDIDATES[candidate].on_policy]
    return sorted(own, key=lambda run: run.seed)


def samples(runs: Sequence[Run], plan: Plan) -> list[float]:
    """Train steps to the target by seed; a run that did not get there counts with its whole length: a lower bound."""
    return [float(plan.steps if run.steps_to is None else run.steps_to) for run in runs]


def judge(report: Report, runs: Sequence[Run], plan: Plan) -> None:
    """One row a task, candidate and staleness, against the best objective on-policy."""
    for game in plan.games:
        plain = [name for name in plan.candidates if not _reuses(CANDIDATES[name])]
        on_policy = {name: mean(samples(chosen(runs, game, name, 0), plan)) for name in plain}
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
                if row := chosen(runs, game, candidate, staleness):
                    _row(report, candidate, row, plan, (best, on_policy[best], best_final))


def _reuses(candidate: Candidate) -> bool:
    return candidate.curriculum is not None or "replay" in candidate.train


def _row(report: Report, candidate: str, picked: Sequence[Run], plan: Plan, best: tuple[str, float, float]) -> None:
    first = picked[0]
    ratios = [value / best[1] for value in samples(picked, plan)]
    low, high = interval(ratios, mean)
    missed = sum(run.steps_to is None for run in picked)
    last = [run.final for run in picked]
    kl, ess = (mean_of_known([value for run in picked for value in run.course[name]]) for name in ("kl", "ess"))
    title = f"{first.game}, {candidate}, staleness {first.staleness}"
    against = (
        f"{best[0]} on-policy ({best[1]:.0f} train steps); 90 %: {low:.2f} to {high:.2f}; {missed} of {len(picked)} "
        f"never; final reward {mean(last):.3f} (there {best[2]:.3f}); KL {kl:.4f}, ESS {ess:.2f}"
    )
    goal = GOALS.get(first.staleness) if candidate == DEFAULT and len(plan.candidates) > 1 else None
    report.add(f"{title}: samples to target", mean(ratios), "x", against=against, at_most=goal)
    if goal is not None:
        report.add(f"{title}: final reward below on-policy", best[2] - mean(last), at_most=MAX_LOSS)


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    names = args.only.split(";") if args.only else list(QUICK_CANDIDATES if args.quick else CANDIDATES)
    unknown = sorted(set(names) - set(CANDIDATES))
    if unknown:
        raise SystemExit(f"--only: {'; '.join(unknown)} is not among {'; '.join(CANDIDATES)}")
    if args.quick:
        # Far fewer steps, on an easier task, than a judgement takes: it shows that everything runs.
        return Plan(("pair",), names, (0, 16), seeds=2, steps=192, min_steps=0)
    return Plan(("sort", "sums"), names, seeds=args.seeds, rate=args.rate)


async def measure(report: Report, args: argparse.Namespace) -> None:
    plan = plan_of(args)
    runs = all_runs(plan, report.note, args.processes, args.runs)
    judge(report, runs, plan)
    if args.plot is not None:
        courses = {
            (game, name, age): [run.course for run in chosen(runs, game, name, age)]
            for game in plan.games
            for name in plan.candidates
            for age in plan.staleness
        }
        draw(args.plot, courses, {game.name: game.target for game in GAMES})


def main() -> int:
    assert __doc__ is not None
    made = parser(__doc__)
    made.add_argument("--only", metavar="NAMES", help=f"some of: {'; '.join(CANDIDATES)}")
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--rate", type=float, default=1.0, help="factor of each task's learning rate")
    made.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="one task each")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as a picture")
    made.add_argument("--runs", type=Path, metavar="FILE", help="keep every run there; what is there is not run again")
    return run(__doc__, measure, made=made)


if __name__ == "__main__":
    raise SystemExit(main())
