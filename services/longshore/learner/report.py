"""What a person finds in the job's folder: metrics.jsonl, summary.json, reward.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from longshore.learner.durable_lines import append_line
from longshore.learner.progress import Evaluation

FIRST_STEPS = 5
LAST_FRACTION = 0.1
Metrics = dict[str, float]


class MetricsFile:
    """metrics.jsonl: one line a train step, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, metrics: Metrics) -> None:
        """Raises OSError; then nothing of the line is written."""
        append_line(self.path, metrics, sync=False)

    def read(self) -> list[Metrics]:
        """All lines that were written whole."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def keep_until(self, step: int) -> None:
        """Drops the lines of steps that a restart will take again."""
        kept = [line for line in self.read() if line["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        part.replace(self.path)


def first_and_last(rewards: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean reward of the first 5 train steps and of the last tenth of them; None without a step."""
    if not rewards:
        return None, None
    first = rewards[:FIRST_STEPS]
    last = rewards[-max(1, math.ceil(len(rewards) * LAST_FRACTION)) :]
    return math.fsum(first) / len(first), math.fsum(last) / len(last)


def write_json(path: Path, value: dict[str, object]) -> None:
    """Replaces a JSON file in one act: a reader sees the old one or the new one."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place."""
    return [math.fsum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]


def draw_reward(path: Path, title: str, lines: Sequence[Metrics], evaluations: Sequence[Evaluation]) -> None:
    """The reward curve with the held-out scores and their 95 % intervals, and the staleness under it, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [line["step"] for line in lines]
    rewards = [line["reward/mean"] for line in lines]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 1), constrained_layout=True
    )
    top.plot(steps, rewards, color="#9ecae1", linewidth=1, label="mean reward of a batch")
    top.plot(steps, smoothed(rewards, 10), color="#08519c", linewidth=2, label="mean of the last 10")
    marked = [(result.step, result.interval) for result in evaluations if result.interval is not None]
    if marked:
        means = [interval.mean for _, interval in marked]
        reach = [
            [max(0.0, interval.mean - interval.low) for _, interval in marked],
            [max(0.0, interval.high - interval.mean) for _, interval in marked],
        ]
        top.errorbar(
            [step for step, _ in marked],
            means,
            yerr=reach,
            fmt="o",
            color="#a63603",
            markersize=6,
            capsize=3,
            clip_on=False,
            label="held out, with 95 % interval",
        )
    top.set(ylabel="reward", title=title, ylim=(min(0.0, *rewards, 0.0), max(1.0, *rewards, 1.0)))
    top.legend(loc="lower right", frameon=False)
    top.grid(alpha=0.25)
    bottom.plot(steps, [line["off_policy/mean"] for line in lines], color="#08519c", linewidth=1, label="mean")
    bottom.plot(steps, [line["off_policy/max"] for line in lines], color="#9ecae1", linewidth=1, label="max")
    highest = max([1.0, *[line["off_policy/max"] for line in lines]])
    bottom.set(xlabel="train step", ylabel="staleness\n(versions)", ylim=(0, highest * 1.6))
    bottom.legend(loc="upper right", frameon=False, ncols=2)
    bottom.grid(alpha=0.25)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    plt.close(figure)
    part.replace(path)
