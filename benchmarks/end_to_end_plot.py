"""The picture of benchmarks/end_to_end.py: reward against rollouts, and against seconds, Longshore's and TRL's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.end_to_end_sides import Learned
from longshore.learner.report import smoothed

WINDOW = 5
_COLOURS = {"Longshore": "#08519c", "TRL": "#a63603"}


def draw(path: Path, courses: Mapping[str, Sequence[tuple[Learned, Learned]]]) -> None:
    """One row a course, one line a side and seed: the mean reward of the last 5 batches."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(
        len(courses), 2, figsize=(9, 0.6 + 2.9 * len(courses)), squeeze=False, constrained_layout=True
    )
    for (name, pairs), (left, right) in zip(courses.items(), rows, strict=True):
        for number, pair in enumerate(pairs):
            for side, learned in zip(_COLOURS, pair, strict=True):
                style = {"color": _COLOURS[side], "linewidth": 1.6, "label": side if number == 0 else None}
                rewards = smoothed(learned.rewards, WINDOW)
                left.plot(learned.rollouts, rewards, **style)
                right.plot(learned.seconds, rewards, **style)
        left.set(xlabel="rollouts", ylabel=f"{name}\nreward, last {WINDOW} batches")
        right.set(xlabel="seconds")
        for axes in (left, right):
            axes.set(ylim=(0, 1))
            axes.grid(alpha=0.25)
        right.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
