"""The learner's train step: trained tokens a second, and memory.

On a CPU against TRL's GRPOTrainer: the same model, batch and machine in the same run, step by step in turns, each in a
process of its own. On CUDA as MFU. Models have random weights; groups are 8 rollouts with prompts of 256 tokens and
completions of lognormal length (sigma 1, mean 256). What is compared and what the settings are: docs/learner.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, parser, run
from benchmarks.learner_load import MODELS
from benchmarks.learner_turns import Course, Side

SPEED_GOAL = 2.0
# Of models larger than the small one. Both sides are alive at once, and shall fit in 12 GB together: TRL has 6.0 GiB in
# its first passes over two rollouts of 788 padded tokens, before its optimizer has any state (1 GiB); Longshore had
# 5.0 GiB with all 2484 places in one pack.
LARGER = {"groups": 1, "micro": 2, "pack_tokens": 2048}


async def measure(report: Report, args: argparse.Namespace) -> None:
    if args.device == "cuda":
        import torch

        from benchmarks import learner_cuda

        if not torch.cuda.is_available():
            report.skip("train step", "this machine has no CUDA device that torch can use")
            return
        learner_cuda.measure(
            report, args.model, quick=args.quick, seconds=args.seconds, device="cuda", kernels=args.kernels
        )
        return
    for course, rounds in _courses(args):
        _compare(report, course, rounds)


def _courses(args: argparse.Namespace) -> list[tuple[Course, int]]:
    """What is trained on a CPU, and how many steps are timed."""
    sizes = {**LARGER, "threads": len(os.sched_getaffinity(0))}
    small = {"threads": sizes["threads"]}
    if args.quick:
        name = args.model or "small"
        return [(Course(name, **(small | {"groups": 1} if name == "small" else sizes)), 3)]
    names = [args.model] if args.model else ["small", "smollm2"]
    return [(Course(name, 4, **small), 7) if name == "small" else (Course(name, **sizes), 3) for name in names]


def _compare(report: Report, course: Course, rounds: int) -> None:
    load, name = course.load, course.model
    padded = 8 * course.groups * (256 + max(len(one) for group in load.completions for one in group))
    report.note(f"{name}: {load.trained} sampled tokens, {load.with_prompts} with prompts, {padded} when padded")
    report.note(f"{name}: TRL {course.micro} rollouts a forward pass, Longshore {course.pack_tokens} tokens")
    if importlib.util.find_spec("trl") is None:
        with Side("longshore", course) as ours:
            _rounds([ours], rounds)
        report.skip(f"{name}: against TRL", "TRL is not installed: pip install --group bench", goal=f">= {SPEED_GOAL}")
        report.add(f"{name}: trained tokens", load.trained / statistics.median(ours.times), "/s")
        return
    with Side("longshore", course) as ours, Side("trl", course) as theirs:
        _rounds([ours, theirs], rounds)
    # Neighbours in time have the same company on the machine.
    ratios = [other / own for own, other in zip(ours.times, theirs.times, strict=True)]
    rate, other = (load.trained / statistics.median(side.times) for side in (ours, theirs))
    spread = f"TRL's GRPOTrainer, {other:,.0f}/s; {rounds} pairs of steps, ratios {min(ratios):.2f}-{max(ratios):.2f}"
    report.add(f"{name}: trained tokens", rate, "/s")
    report.add(f"{name}: against TRL", statistics.median(ratios), "x", against=spread, at_least=SPEED_GOAL)
    memory = f"TRL {_mib(theirs.peak)}, of which {_mib(theirs.before)} before the first step"
    report.add(f"{name}: peak memory", ours.peak / 2**20, "MiB", against=memory)
    report.add(
        f"{name}: memory of a step", (ours.peak - ours.before) / (theirs.peak - theirs.before), "x", against="TRL's"
    )


def _rounds(sides: Sequence[Side], rounds: int) -> None:
    for side in sides:
        # The first step makes the optimizer's state.
        side.step()
    for side in sides:
        side.times.clear()
    for _ in range(rounds):
        for side in sides:
            side.step()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__ or "")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--model", choices=tuple(MODELS), help="absent: what fits the device and the time")
    made.add_argument("--seconds", type=float, default=220.0, help="with cuda: nothing new is begun after this long")
    made.add_argument("--kernels", type=Path, metavar="FILE", help="with cuda: write where the time goes, by kernel")
    return run(__doc__ or "", measure, argv, made=made)


if __name__ == "__main__":
    sys.exit(main())
