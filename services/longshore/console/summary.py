"""The last words of a job: a short table of what came out and what to try next. Pure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longshore.console.progress import duration

Rows = list[tuple[str, str]]


def summary_rows(summary: dict[str, Any], run_dir: Path, job_file: str | None) -> Rows:
    """(label, text) rows for a job that ended in order.

    Args:
        job_file: the file that the job came from, where that is known.
    """
    return [
        ("reward", f"{_change(summary, 'reward_first', 'reward_last')}  (first 5 train steps -> last 10 %)"),
        ("held out", f"{_change(summary, 'eval_before', 'eval_after')}  (before -> after)"),
        *_paired(summary),
        ("rollouts", _rollouts(summary)),
        ("staleness", f"mean {_number(summary.get('staleness_mean'))}, max {summary.get('staleness_max', '-')}"),
        ("policy", f"version {summary.get('policy_version', '-')} after {summary.get('steps', '-')} train steps"),
        ("took", duration(summary.get("seconds") or 0)),
        ("results", str(shown(run_dir))),
        *_next(summary, shown(run_dir), job_file),
    ]


def _rollouts(summary: dict[str, Any]) -> str:
    accounted: dict[str, int] = summary.get("rollouts_accounted") or {}
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(accounted.items()) if count)
    issued, trained = summary.get("rollouts_issued", 0), summary.get("rollouts_trained", 0)
    text = f"{issued:,} issued = {trained:,} trained + {sum(accounted.values()):,} accounted"
    return f"{text} ({reasons})" if reasons else text


def _paired(summary: dict[str, Any]) -> Rows:
    """Whether the difference on held-out tasks can be chance."""
    paired = summary.get("eval_paired")
    if not paired:
        return []
    text = f"{paired['better']:,} better, {paired['worse']:,} worse of {paired['tasks']:,}"
    return [("paired", f"{text}: p = {paired['p']:.2g}  (exact; by chance, either way)")]


def _change(summary: dict[str, Any], first: str, last: str) -> str:
    return f"{_number(summary.get(first))} -> {_number(summary.get(last))}"


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "-"


def _next(summary: dict[str, Any], run_dir: Path, job_file: str | None) -> Rows:
    ideas = [
        f"look at {run_dir / 'reward.png'}",
        f'AutoModelForCausalLM.from_pretrained("{run_dir / "checkpoint"}")',
    ]
    if job_file is not None:
        ideas.append(f"longshore run {job_file} --seed {int(summary.get('seed') or 0) + 1}    (another seed)")
        ideas.append("longshore up    (then give it jobs with `longshore submit` or curl)")
    return [("try next" if index == 0 else "", idea) for index, idea in enumerate(ideas)]


def shown(path: Path) -> Path:
    """The path as a person would type it here."""
    here = Path.cwd()
    return Path(os.path.relpath(path, here)) if path.is_relative_to(here) else path
