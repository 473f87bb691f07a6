"""The picture of the staleness benchmark: reward by train step, a panel a task and staleness, a line a candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Courses = Mapping[tuple[str, str, int], Sequence[Mapping[str, Any]]]


def draw(path: Path, courses: Courses, targets: Mapping[str, float]) -> None:
    """Writes it.

    Args:
        path: a PNG file.
        courses: of each task, candidate and staleness, one a seed; none where it was not run.
        targets: rewards that count as learned, by task.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    games = list(dict.fromkeys(game for game, _, _ in courses))
    names = list(dict.fromkeys(name for _, name, _ in courses))
    ages = list(dict.fromkeys(age for _, _, age in courses))
    figure, panels = plt.subplots(
        len(games),
        len(ages),
        figsize=(3.4 * len(ages), 2.8 * len(games)),
        sharex=True,
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    for row, game in zip(panels, games, strict=True):
        for panel, age in zip(row, ages, strict=True):
            for name, colour in zip(names, colours, strict=False):
                if runs := courses[game, name, age]:
                    looks = zip(*[course["rewards"] for course in runs], strict=True)
                    means = [sum(values) / len(values) for values in looks]
                    panel.plot(runs[0]["steps"], means, linewidth=1.3, color=colour, label=name)
            panel.axhline(targets[game], linewidth=0.8, linestyle=":", color="black")
            panel.set(title=f"{game}, {age} versions old", ylim=(0, 1))
            panel.grid(alpha=0.25)
        row[0].set(ylabel="reward of the current policy")
    for panel in panels[-1]:
        panel.set(xlabel="train step")
    handles = {
        label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
