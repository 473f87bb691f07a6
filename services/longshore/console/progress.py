"""What a job's events add up to, and how that reads. Pure: no terminal, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Json = dict[str, Any]

_BLOCKS = "▁▂▃▄▅▆▇█"
_PHASES = {
    "loading": "loading the model and the tasks",
    "warm_start": "warm start",
    "evaluate_before": "held-out tasks, before",
    "train": "training",
    "evaluate_after": "held-out tasks, after",
    "saving": "saving the checkpoint",
    "done": "done",
}


@dataclass(frozen=True)
class Status:
    """The moving line. `done` of `total` is a bar where total > 0; `facts` are dropped from the end for room."""

    title: str
    done: int = 0
    total: int = 0
    facts: tuple[str, ...] = ()


@dataclass
class JobProgress:
    """Folds events. `apply` answers what is worth a line of its own."""

    state: str = "queued"
    message: str = ""
    phase: str = ""
    status: Status = Status("queued")
    # Mean reward by train step; a learner that was restarted takes steps again.
    rewards: dict[int, float] = field(default_factory=dict)
    summary: Json | None = None
    _warm: Json = field(default_factory=dict)

    @property
    def state_is_final(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")

    def apply(self, event: Json) -> list[str]:
        """Takes in one event; returns the lines to keep on the screen."""
        handler = getattr(self, f"_on_{event.get('type')}", None)
        lines: list[str] = handler(event) if handler else []
        return lines

    def _on_state(self, event: Json) -> list[str]:
        self.state, self.message = event["state"], event.get("message", "")
        if not self.phase or self.state in ("cancelling", "cancelled", "failed"):
            self.status = Status(self.state)
        return ["cancelling: the learner closes its books"] if self.state == "cancelling" else []

    def _on_process(self, event: Json) -> list[str]:
        name, restarts = event["name"], event.get("restarts", 0)
        if event["state"] == "ready":
            return [f"{name} is ready" + (f" again (restart {restarts})" if restarts else "")]
        return [f"{name} died ({how_it_died(event.get('exit_code'))}) and is started again; its log: {event['log']}"]

    def _on_phase(self, event: Json) -> list[str]:
        ended, self.phase = self.phase, event["phase"]
        self.status = Status(_PHASES.get(self.phase, self.phase))
        if ended == "warm_start" and self._warm and self.phase != "warm_start":
            steps, loss = self._warm["step"], self._warm["loss"]
            return [f"warm start: {steps} steps, loss {loss:.3f}"]
        return []

    def _on_warm_start(self, event: Json) -> list[str]:
        self._warm = event
        facts = (f"loss {event['loss']:.3f}",)
        self.status = Status("warm start", event["step"], event["steps"], facts)
        return []

    def _on_evaluation(self, event: Json) -> list[str]:
        when, done, tasks, reward = event["when"], event["done"], event["tasks"], event.get("reward")
        if when == "step":
            # Training goes on beside it, and has the line.
            when = f"after step {event['step']}"
        else:
            self.status = Status(f"held-out tasks, {when}", done, tasks)
        if reward is None:
            return []
        sure = f" ({event['low']:.3f} to {event['high']:.3f})" if "low" in event else ""
        return [f"held-out tasks, {when}: mean reward {reward:.3f}{sure} over {tasks}"]

    def _on_step(self, event: Json) -> list[str]:
        step, metrics = event["step"], event["metrics"]
        self.rewards = {old: reward for old, reward in self.rewards.items() if old < step}
        self.rewards[step] = metrics.get("reward/mean", 0.0)
        self.status = Status("train step", step, event["steps"], _train_facts(list(self.rewards.values()), metrics))
        return []

    def _on_warning(self, event: Json) -> list[str]:
        return [f"warning: {event['message']}"]

    def _on_summary(self, event: Json) -> list[str]:
        self.summary = event["summary"]
        return []


def _train_facts(rewards: Sequence[float], metrics: Json) -> tuple[str, ...]:
    """What matters most comes first: the end is cut off on a narrow terminal."""
    recent = rewards[-10:]
    facts = [f"reward {sum(recent) / len(recent):.2f} {sparkline(rewards, 12)}"]
    if (left := metrics.get("time/remaining")) is not None:
        facts.append(f"{duration(left)} left")
    if (rate := metrics.get("perf/tokens_per_s")) is not None:
        facts.append(f"{rate:,.0f} tok/s")
    if (mean := metrics.get("off_policy/mean")) is not None:
        facts.append(f"staleness {mean:.1f} (max {metrics.get('off_policy/max', mean):.0f})")
    if (version := metrics.get("policy_version")) is not None:
        facts.append(f"policy v{version:.0f}")
    return tuple(facts)


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of values in at most `width` characters, each the mean of its share; 0..1 is the whole height."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(0.0, *means), max(1.0, *means)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / (high - low) * top)] for mean in means)


def duration(seconds: float) -> str:
    """Example: 0:42, 12:05, 3:00:10"""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def how_it_died(exit_code: int | None) -> str:
    """Example: "exit code 1", "signal 9" """
    if exit_code is None:
        return "how is unknown"
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
