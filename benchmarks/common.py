"""What every benchmark shares: its arguments, its figures as a table and as JSON, the machine it ran on.

A benchmark is a script: `python benchmarks/NAME.py [--quick] [--json FILE]`. Its first lines put the project's root in
place of this folder on the module path, where `queue.py` would hide Python's own module `queue`. It measures, adds
figures to a Report and returns `report.finish()`: 0 when every goal that could be judged holds, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

_VERDICT = {True: "[green]holds[/]", False: "[red]falls short[/]", None: ""}


@dataclass(frozen=True)
class Figure:
    """One row. `value` is text where there is no number: why it was not measured.

    Example: Figure("deliver, read", 0.71, "x", against="bare redis-py, 9,100/s", goal=">= 0.6", holds=True)
    """

    name: str
    value: float | str
    unit: str = ""
    # What the value is compared with, and what is in each side.
    against: str = ""
    goal: str = ""
    # None: there is no goal, or it could not be judged.
    holds: bool | None = None


class Report:
    """The figures of one benchmark's run, in the order in which they are added."""

    def __init__(self, title: str, args: argparse.Namespace) -> None:
        self._title = title
        self._args = args
        # A file or a pipe has no width of its own.
        self._console = Console(width=None if sys.stdout.isatty() else 150)
        self._figures = [Figure("machine", machine()), Figure("mode", "quick" if args.quick else "full")]

    def add(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        against: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> Figure:
        """Adds a measured value, judged by its goal where it has one."""
        goal, holds = "", None
        if at_least is not None:
            goal, holds = f">= {_text(at_least)}", value >= at_least
        elif at_most is not None:
            goal, holds = f"<= {_text(at_most)}", value <= at_most
        return self._append(Figure(name, value, unit, against, goal, holds))

    def skip(self, name: str, why: str, goal: str = "") -> Figure:
        """Adds a row that says why something was not measured."""
        return self._append(Figure(name, f"not measured: {why}", goal=goal))

    def note(self, text: str) -> None:
        """Shows a line at once: what is being measured now."""
        self._console.print(f"[dim]{text}[/]", highlight=False)

    def finish(self) -> int:
        """Shows the table and writes the JSON file, if one was asked for. Returns the process's exit status."""
        table = Table(title=self._title, title_justify="left", title_style="bold")
        table.add_column("figure", overflow="fold")
        table.add_column("value", justify="right", overflow="fold")
        for name in ("against", "goal", ""):
            table.add_column(name, overflow="fold")
        for figure in self._figures:
            value = figure.value if isinstance(figure.value, str) else f"{_text(figure.value)} {figure.unit}".rstrip()
            table.add_row(figure.name, value, figure.against, figure.goal, _VERDICT[figure.holds])
        self._console.print(table)
        if self._args.json is not None:
            rows = [asdict(figure) for figure in self._figures]
            self._args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return int(any(figure.holds is False for figure in self._figures))

    def _append(self, figure: Figure) -> Figure:
        self._figures.append(figure)
        return figure


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that knows `--quick` and `--json`; a benchmark may add its own options."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="smaller loads, under a minute; the figures are rougher")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as a list of objects")
    return made


def run(
    description: str,
    measure: Callable[[Report, argparse.Namespace], Awaitable[None]],
    argv: Sequence[str] | None = None,
    *,
    made: argparse.ArgumentParser | None = None,
) -> int:
    """A benchmark's main: parses, measures, shows. Returns the exit status."""
    args = (made or parser(description)).parse_args(argv)
    report = Report(description.partition("\n")[0].rstrip("."), args)

    async def measured() -> None:
        await measure(report, args)

    asyncio.run(measured())
    return report.finish()


def machine() -> str:
    """Processor, cores and memory of this machine, and the date. Example: "AMD EPYC, 2 cores, 8 GB, 2026-01-31" """
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{_processor()}, {cores} cores, {memory:.0f} GB, Python {platform.python_version()}, {today}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _text(value: float) -> str:
    """Four digits or so, with thousands set apart."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
