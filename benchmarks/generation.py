"""Generation: the torch engine against transformers, and the generator service against its engine.

Every figure is a ratio against something measured in the same run, in turns, each side a process of its own. What is
compared, and what came of it: docs/torch-engine.md. The small model is that of examples/first-light.yaml; SmolLM2 needs
the models that `make bench` installs. For vLLM, run it with the Python of vLLM's environment:

    .venv-vllm/bin/python benchmarks/generation.py --engine vllm --only service
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import generation_service
from benchmarks.common import Report, parser, run
from benchmarks.generation_models import LOADS, Load, absent
from benchmarks.generation_service import World
from benchmarks.weight_sync_wan import Talker

CONCURRENT = 32
GENERATE_GOAL = 3.0
PARTS = ("torch", "service")


async def measure(report: Report, args: argparse.Namespace) -> None:
    report.note(f"load average before: {os.getloadavg()[0]:.1f}")
    for load in [LOADS[name] for name in args.models or (("small",) if args.quick else LOADS)]:
        if lacks := absent(load.model):
            report.skip(f"{load.model}", f"needs {lacks}: make bench installs it")
            continue
        if "torch" in args.only and args.engine == "torch":
            await asyncio.to_thread(_in_folder, report, load, 2 if args.quick else 5)
        if "service" in args.only:
            report.note(f"{load.model}: the service against the engine alone")
            await _service(report, args, load)
    report.note(f"load average after: {os.getloadavg()[0]:.1f}")


async def _service(report: Report, args: argparse.Namespace, load: Load) -> None:
    with tempfile.TemporaryDirectory(prefix="ls-bench-") as folder:
        world = World(Path(folder), args.engine)
        try:
            rounds = 2 if args.quick else 5
            # SmolLM2 reads 32 prompts for seconds before it draws.
            window_s = (
                {"small": 1.5, "smollm2": 8.0}[load.model]
                if args.quick
                else {"small": 4.0, "smollm2": 15.0}[load.model]
            )
            await generation_service.measure(report, world, load, args.engine, rounds, window_s)
        finally:
            world.close()


def _in_folder(report: Report, load: Load, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="ls-bench-") as folder:
        world = World(Path(folder), "torch")
        try:
            _peers(report, world, load, rounds)
        finally:
            world.close()


def _peers(report: Report, world: World, load: Load, rounds: int) -> None:
    """32 replies at once: of the engine, of generate(), of continuous batching; each with the threads that suit it."""
    report.note(f"{load.model}: {CONCURRENT} requests at once")
    cores = len(os.sched_getaffinity(0))
    ours, how = _faster(world, load, {"one thread": ("engine", 1), f"{cores} threads": ("engine", cores)})
    calls, calls_how = _faster(
        world,
        load,
        {"one after another": ("generate-1", cores), f"{cores} at a time": (f"generate-{cores}", 1)},
    )
    batching, batching_how = _faster(
        world, load, {"one thread": ("batching", 1), f"{cores} threads": ("batching", cores)}
    )
    ask = f"draw {CONCURRENT} {load.reply}"
    seconds: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        own, called, batched = (side.ask(ask)["seconds"] for side in (ours, calls, batching))
        seconds.append((own, called, batched))
    rate = CONCURRENT * load.reply / statistics.median(own for own, _, _ in seconds)
    report.add(f"torch engine, {load.model}, {CONCURRENT} at once ({how})", rate, "tokens/s")
    for name, place, goal in (
        (f"generate() called per request, {calls_how}", 1, GENERATE_GOAL),
        (f"transformers' continuous batching, {batching_how}", 2, None),
    ):
        ratios = [row[place] / row[0] for row in seconds]
        other = CONCURRENT * load.reply / statistics.median(row[place] for row in seconds)
        report.add(
            f"torch engine, {load.model}, against {name}",
            statistics.median(ratios),
            "x",
            against=f"{other:,.0f} tokens/s; {rounds} rounds, {min(ratios):.1f}-{max(ratios):.1f}",
            at_least=goal,
        )


def _faster(world: World, load: Load, sides: dict[str, tuple[str, int]]) -> tuple[Talker, str]:
    """Of ways to set one side up, the one that is faster here, warm; the others are ended."""
    talkers = {name: world.side(side, load.model, threads) for name, (side, threads) in sides.items()}
    for talker in talkers.values():
        talker.hear()
    times = {name: min(talker.ask("draw 4 8")["seconds"] for _ in range(3)) for name, talker in talkers.items()}
    best = min(times, key=lambda name: times[name])
    for name, talker in talkers.items():
        if name != best:
            talker.end()
    return talkers[best], best


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__ or "")
    made.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="absent: all parts")
    made.add_argument("--models", nargs="+", choices=tuple(LOADS), help="absent: the small one if --quick, else all")
    return run(__doc__ or "", measure, argv, made=made)


if __name__ == "__main__":
    sys.exit(main())
