"""The whole system against TRL: trained tokens a second, time to a reward, and reward at equal samples.

    python benchmarks/end_to_end.py [--quick] [--json FILE] [--course NAME] [--seeds N] [--plot FILE]

One job through `longshore run`, every service a process of its own, then through TRL's GRPOTrainer: the same
checkpoint, tokenizer, tasks in the same order, verifier, objective (DAPO), batch, learning rates and number of
rollouts, on the same machine. The start of either (imports, loading, the warm start that both begin with) is left out.
What TRL's settings are, and which others were tried: docs/learner.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, parser, run
from benchmarks.end_to_end_course import ALPHABET, FIRST_LIGHT, NUM_HELDOUT, QUICK, job_of
from benchmarks.end_to_end_sides import Learned, heldout_rewards, make_course, train_longshore, train_trl
from longshore.learner.intervals import bootstrap

SPEED_GOAL = 2.0
# The reward that is waited for, as a mean of so many batches.
TARGETS, WINDOW = {ALPHABET: 0.85, FIRST_LIGHT: 0.85, QUICK: 0.3}, 5


@dataclass(frozen=True)
class Pair:
    """One seed on both sides; held-out rewards are of the same tasks in the same order."""

    seed: int
    longshore: Learned
    trl: Learned
    before: list[float]
    after: list[float]
    trl_after: list[float]


async def measure(report: Report, args: argparse.Namespace) -> None:
    if importlib.util.find_spec("trl") is None:
        report.skip("against TRL", "TRL is not installed: pip install --group bench", goal=f">= {SPEED_GOAL}")
        return
    plots: dict[str, list[Pair]] = {}
    for name in _courses(args):
        with tempfile.TemporaryDirectory(prefix="ls-end-to-end-") as home:
            pairs = [_pair(report, name, Path(home), seed) for seed in range(args.seeds)]
        _compare(report, name, pairs)
        plots[name] = pairs
    if args.plot:
        from benchmarks.end_to_end_plot import draw

        draw(args.plot, {name: [(pair.longshore, pair.trl) for pair in pairs] for name, pairs in plots.items()})


def _courses(args: argparse.Namespace) -> list[str]:
    if args.quick:
        return [QUICK]
    return [args.course] if args.course else [ALPHABET, FIRST_LIGHT]


def _pair(report: Report, name: str, home: Path, seed: int) -> Pair:
    folder = home / f"{name}-{seed}"
    folder.mkdir()
    report.note(f"{name}, seed {seed}: the checkpoint that both begin with")
    course = make_course(job_of(name, folder, seed), folder)
    number = NUM_HELDOUT[name]
    report.note(f"{name}, seed {seed}: Longshore")
    ours = train_longshore(course, folder)
    report.note(f"{name}, seed {seed}: Longshore {ours.rate:,.0f} tokens/s ({ours.detail}); now TRL")
    theirs = train_trl(folder)
    report.note(f"{name}, seed {seed}: TRL {theirs.rate:,.0f} tokens/s ({theirs.detail}); held-out tasks")
    before, after, other = (
        heldout_rewards(course, checkpoint, number) for checkpoint in (course.start, ours.checkpoint, theirs.checkpoint)
    )
    return Pair(seed, ours, theirs, before, after, other)


def _compare(report: Report, name: str, pairs: Sequence[Pair]) -> None:
    ratios = [pair.longshore.rate / pair.trl.rate for pair in pairs]
    rate = statistics.median(pair.longshore.rate for pair in pairs)
    other = statistics.median(pair.trl.rate for pair in pairs)
    first = pairs[0]
    budget = f"{first.trl.rollouts[-1]:,.0f} rollouts, {first.trl.tokens[-1]:,.0f} sampled tokens"
    report.add(f"{name}: trained tokens", rate, "/s", against=f"{budget}; {first.longshore.detail}")
    spread = f"TRL's GRPOTrainer, {other:,.0f}/s, {first.trl.detail}; {_each(ratios)}"
    report.add(f"{name}: against TRL", statistics.median(ratios), "x", against=spread, at_least=SPEED_GOAL)
    _time_to_reward(report, name, pairs)
    _held_out(report, name, pairs)


def _time_to_reward(report: Report, name: str, pairs: Sequence[Pair]) -> None:
    target = TARGETS[name]
    title = f"{name}: time to a reward of {target}"
    found, told = [], []
    for pair in pairs:
        ours, theirs = (side.reached(target, WINDOW) for side in (pair.longshore, pair.trl))
        if theirs is None:
            told.append("TRL never")
            continue
        if ours is None:
            found.append(0.0)
            told.append("Longshore never")
            continue
        seconds, other = pair.longshore.seconds[ours], pair.trl.seconds[theirs]
        found.append(other / seconds)
        told.append(f"{seconds:.0f} s against {other:.0f} s, step {ours + 1} against {theirs + 1}")
    if found:
        against = f"TRL's; {'; '.join(told)}"
        report.add(title, statistics.median(found), "x sooner", against=against, at_least=1.0)
    else:
        report.skip(title, "TRL did not reach it in its budget")


def _held_out(report: Report, name: str, pairs: Sequence[Pair]) -> None:
    """The difference of the two policies on the same tasks; it is no worse where the interval reaches 0."""
    differences = [own - other for pair in pairs for own, other in zip(pair.after, pair.trl_after, strict=True)]
    low, high = bootstrap(differences)
    before, after, other = (
        statistics.mean(reward for pair in pairs for reward in rewards)
        for rewards in (
            [reward for pair in pairs for reward in pair.before],
            [reward for pair in pairs for reward in pair.after],
            [reward for pair in pairs for reward in pair.trl_after],
        )
    )
    report.add(f"{name}: reward, held out", after, against=f"TRL {other:.3f}; both began at {before:.3f}")
    interval = f"{low:+.3f} to {high:+.3f} (95 %, {len(differences):,} paired tasks of {len(pairs)} seeds)"
    report.add(f"{name}: that difference", statistics.mean(differences), against=interval)
    report.add(f"{name}: its upper bound: no worse than TRL", high, at_least=0.0)
    means = [statistics.mean(side.mean_reward for side in sides) for sides in _sides(pairs)]
    report.add(f"{name}: reward, mean over the budget", means[0], against=f"TRL {means[1]:.3f}")


def _sides(pairs: Sequence[Pair]) -> tuple[list[Learned], list[Learned]]:
    return [pair.longshore for pair in pairs], [pair.trl for pair in pairs]


def _each(ratios: Sequence[float]) -> str:
    return f"by seed {', '.join(f'{ratio:.2f}' for ratio in ratios)}"


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__ or "")
    made.add_argument("--course", choices=(ALPHABET, FIRST_LIGHT), help="absent: both, one after the other")
    made.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1, one after another")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw reward against rollouts and against seconds")
    return run(__doc__ or "", measure, argv, made=made)


if __name__ == "__main__":
    sys.exit(main())
