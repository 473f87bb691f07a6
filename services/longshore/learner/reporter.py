"""Tells people and machines how a job is doing: events, metrics.jsonl, Prometheus, and the summary at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import structlog

from longshore.config import JobSpec
from longshore.learner import metrics
from longshore.learner.disk import when_there_is_room
from longshore.learner.durable_lines import append_line
from longshore.learner.groups import Group
from longshore.learner.health_metrics import observe_line
from longshore.learner.intervals import Interval
from longshore.learner.ledger import Ledger
from longshore.learner.progress import Evaluating, Evaluation, Progress
from longshore.learner.report import MetricsFile, draw_reward, first_and_last, write_json
from longshore.types import JobRef

log = structlog.get_logger()

# Train steps over which the pace is averaged for the time that is left.
PACE_STEPS = 20
# Rollouts that a warning names.
_NAMED = 20
# An evaluation reports at most this often, in seconds.
EVALUATION_EVERY_S = 0.5

Publish = Callable[[dict[str, object]], Awaitable[None]]


class Reporter:
    """Reports of one learner incarnation."""

    def __init__(self, job: JobRef, spec: JobSpec, run_dir: Path, publish: Publish) -> None:
        self._job = job
        self._spec = spec
        self._run_dir = run_dir
        self._publish = publish
        self._lines = MetricsFile(run_dir / "metrics.jsonl")
        self._labels = (job.project, job.job)
        self._last_step_at = time.monotonic()
        self._pace: deque[float] = deque(maxlen=PACE_STEPS)
        self._evaluation_at = 0.0

    async def rewind(self, step: int) -> None:
        """Forgets the lines of steps that will be taken again."""
        await when_there_is_room(lambda: self._lines.keep_until(step), "metrics.jsonl")

    async def phase(self, phase: str, detail: str = "") -> None:
        log.info("phase", phase=phase, detail=detail)
        self._last_step_at = time.monotonic()
        await self._publish({"type": "phase", "phase": phase, "detail": detail})

    async def warn(self, message: str) -> None:
        log.warning(message)
        await self._publish({"type": "warning", "message": message})

    async def spoilt(self, step: int, rollouts: Sequence[str], *, in_logprobs: bool) -> None:
        """A train step that was not taken: `rollouts` have log-probs or losses that are no numbers, or else, all of
        them together, the gradient."""
        item = {"step": step, "rollouts": list(rollouts), "in_logprobs": in_logprobs}
        path = self._run_dir / "learner" / "not_finite.jsonl"
        await when_there_is_room(lambda: append_line(path, item), "a record of rollouts")
        metrics.SPOILT.labels(*self._labels).inc()
        what = "log-probs of" if in_logprobs else "gradient of a batch with"
        more = f" and {len(rollouts) - _NAMED} more" if len(rollouts) > _NAMED else ""
        named = f"{what} rollouts {', '.join(rollouts[:_NAMED])}{more}"
        await self.warn(f"train step {step} was not taken and its batch is accounted as not_finite: {named}")

    async def warm_start(self, step: int, loss: float) -> None:
        steps = self._spec.warm_start.steps if self._spec.warm_start else step
        await self._publish({"type": "warm_start", "step": step, "steps": steps, "loss": loss})

    async def evaluation(self, running: Evaluating, groups: Sequence[Group], result: Evaluation | None) -> None:
        """Progress of an evaluation; `result` once all of it is in."""
        now = time.monotonic()
        if result is None and now - self._evaluation_at < EVALUATION_EVERY_S:
            return
        self._evaluation_at = now
        done = sum(group.closed for group in groups)
        event = {"type": "evaluation", **asdict(running), "done": done, "tasks": len(groups), "reward": None}
        if result is not None:
            # A job without a single scored task has earned nothing.
            event |= {"reward": 0.0, "scored": result.scored} | _told(result.interval)
            metrics.observe_evaluation(self._labels, result.metrics())
        await self._publish(event)

    async def step(
        self,
        progress: Progress,
        ledger: Ledger,
        batch: dict[str, float],
        results: dict[str, float],
        times: dict[str, float],
    ) -> None:
        """One train step: `batch` is what `batch_metrics` says of it, `times` in seconds."""
        now = time.monotonic()
        elapsed, self._last_step_at = now - self._last_step_at, now
        self._pace.append(elapsed)
        left = self._spec.train.steps - progress.step
        line = {
            "step": float(progress.step),
            "policy_version": float(progress.version),
            **batch,
            "tickets/issued": float(ledger.issued),
            **results,
            **{f"time/{name}": value for name, value in times.items()},
            "time/step": elapsed,
            "time/remaining": left * sum(self._pace) / len(self._pace),
        }
        line["perf/tokens_per_s"] = line["tokens/sampled"] / max(elapsed, 1e-9)
        await when_there_is_room(lambda: self._lines.append(line), "a line of metrics")
        self._observe(line, times, ledger)
        await self._publish({"type": "step", "step": progress.step, "steps": self._spec.train.steps, "metrics": line})

    def _observe(self, line: dict[str, float], times: dict[str, float], ledger: Ledger) -> None:
        metrics.TRAIN_STEP.labels(*self._labels).set(line["step"])
        metrics.POLICY_VERSION.labels(*self._labels).set(line["policy_version"])
        metrics.REWARD_MEAN.labels(*self._labels).set(line["reward/mean"])
        metrics.STALENESS.labels(*self._labels).set(line["off_policy/mean"])
        metrics.STEP_SECONDS.labels(*self._labels).observe(times["forward_backward"])
        metrics.WAIT_SECONDS.labels(*self._labels).inc(times["wait_for_batch"])
        metrics.TOKENS.labels(*self._labels).inc(line["tokens/sampled"])
        metrics.IN_FLIGHT.labels(*self._labels).set(ledger.num_out)
        observe_line(self._labels, line)
        for outcome, count in ledger.outcomes.items():
            metrics.TICKETS.labels(*self._labels, outcome).set(count)

    async def finish(self, state: str, progress: Progress, ledger: Ledger) -> dict[str, object]:
        """Writes reward.png and summary.json, and says that the job is done. Returns the summary."""
        lines = self._lines.read()
        summary = self._summary(state, progress, ledger, [line["reward/mean"] for line in lines])
        if lines:
            title = f"{self._job.job}: mean reward by train step"
            picture = self._run_dir / "reward.png"
            await when_there_is_room(lambda: draw_reward(picture, title, lines, progress.results), "reward.png")
        await when_there_is_room(lambda: write_json(self._run_dir / "summary.json", summary), "summary.json")
        await self._publish({"type": "summary", "summary": summary})
        await self.phase("done")
        return summary

    def _summary(self, state: str, progress: Progress, ledger: Ledger, rewards: Sequence[float]) -> dict[str, object]:
        first, last = first_and_last(rewards)
        return {
            "job_id": self._job.job,
            "project": self._job.project,
            "state": state,
            "seed": self._spec.seed,
            "steps": progress.step,
            "policy_version": progress.version,
            "rollouts_issued": ledger.issued,
            "rollouts_trained": ledger.trained,
            "rollouts_accounted": ledger.accounted,
            "rollouts_by_site": ledger.by_site,
            "reward_first": first,
            "reward_last": last,
            "eval_before": progress.evaluations.get("before"),
            "eval_after": progress.evaluations.get("after"),
            "evaluations": [_row(result) for result in progress.results],
            "eval_paired": None if progress.paired is None else asdict(progress.paired),
            "staleness_mean": progress.staleness_mean,
            "staleness_max": progress.staleness_max,
            "seconds": round(time.time() - progress.started_at, 1),
        }


def _row(result: Evaluation) -> dict[str, object]:
    row = asdict(result)
    del row["interval"]
    return row | {"reward": None} | _told(result.interval)


def _told(interval: Interval | None) -> dict[str, object]:
    """As people read it: `reward` lies between `low` and `high` with a confidence of 95 %."""
    if interval is None:
        return {}
    return {"reward": interval.mean, "low": interval.low, "high": interval.high, "interval": interval.method}
