"""What the times seen by benchmarks/recovery.py come to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recovery:
    """One kill of the learner; all times in seconds after it."""

    detected: float
    # The first train step of the new life, and the first that the old life had not recorded yet.
    first_step: float
    first_new_step: float
    redone: int


def cold_start(spawned: float, events: Sequence[tuple[float, dict[str, Any]]]) -> float:
    """Seconds from a learner's first start until it could train, without its warm start.

    Args:
        spawned: when the process was started.
        events: (when, event) of a job that begins with a warm start, oldest first.

    Raises:
        ValueError: the events do not tell of a warm start with training after it.
    """
    began, ended = _phase(events, "warm_start"), None
    for at, event in events:
        if event["type"] == "warm_start":
            ended = at
    train = _phase(events, "train")
    if began is None or ended is None or train is None:
        raise ValueError("no warm start, or no training after it")
    return (began - spawned) + (train - ended)


def redone_steps(recorded_before: Sequence[int], first_after: int) -> int:
    """Train steps that a new life takes again.

    Args:
        recorded_before: steps of the batch record at the moment of the kill.
        first_after: the first step of the new life.
    """
    return max(0, max(recorded_before, default=0) - first_after + 1)


def _phase(events: Sequence[tuple[float, dict[str, Any]]], name: str) -> float | None:
    return next((at for at, event in events if event["type"] == "phase" and event["phase"] == name), None)
