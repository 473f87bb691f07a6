from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.text import Text

from longshore.console.progress import JobProgress, Status, duration, sparkline
from longshore.console.screen import PLAIN_EVERY_S, PlainScreen, make_screen
from longshore.console.summary import summary_rows
from longshore.console.terminal import fitted

METRICS = {
    "reward/mean": 0.25,
    "perf/tokens_per_s": 12345.6,
    "off_policy/mean": 0.94,
    "off_policy/max": 2.0,
    "policy_version": 41.0,
    "time/remaining": 83.2,
}
SUMMARY = {
    "state": "succeeded",
    "seed": 4,
    "steps": 200,
    "policy_version": 200,
    "rollouts_issued": 26_600,
    "rollouts_trained": 25_000,
    "rollouts_accounted": {"zero_variance": 600, "evaluation": 1000, "rejected": 0},
    "reward_first": 0.3111,
    "reward_last": 0.87,
    "eval_before": None,
    "eval_after": 0.8,
    "staleness_mean": 0.9,
    "staleness_max": 2,
    "seconds": 201.4,
}


def step(number: int, reward: float) -> dict[str, object]:
    return {"type": "step", "step": number, "steps": 400, "metrics": {**METRICS, "reward/mean": reward}}


def test_a_job_told_from_start_to_end() -> None:
    progress = JobProgress()
    lines = [
        line
        for event in [
            {"type": "state", "state": "starting", "message": ""},
            {"type": "process", "name": "actor-0", "state": "ready", "restarts": 0},
            {"type": "phase", "phase": "warm_start", "detail": ""},
            {"type": "warm_start", "step": 300, "steps": 300, "loss": 0.98765},
            {"type": "phase", "phase": "evaluate_before", "detail": ""},
            {"type": "evaluation", "when": "before", "done": 100, "tasks": 500, "reward": None},
            {"type": "evaluation", "when": "before", "done": 500, "tasks": 500, "reward": 0.2512},
            {"type": "phase", "phase": "train", "detail": ""},
            step(1, 0.25),
            {"type": "evaluation", "when": "step", "step": 1, "done": 3, "tasks": 500, "reward": None},
            {
                "type": "evaluation",
                "when": "step",
                "step": 1,
                "done": 500,
                "tasks": 500,
                "reward": 0.4,
                "low": 0.358,
                "high": 0.4436,
            },
            {
                "type": "process",
                "name": "actor-0",
                "state": "restarting",
                "restarts": 0,
                "exit_code": -9,
                "log": "a.log",
            },
            {"type": "process", "name": "actor-0", "state": "ready", "restarts": 1},
            {"type": "warning", "message": "slow"},
            {"type": "something-of-a-later-version"},
            {"type": "summary", "summary": {"state": "succeeded"}},
            {"type": "state", "state": "succeeded", "message": ""},
        ]
        for line in progress.apply(event)
    ]
    assert lines == [
        "actor-0 is ready",
        "warm start: 300 steps, loss 0.988",
        "held-out tasks, before: mean reward 0.251 over 500",
        "held-out tasks, after step 1: mean reward 0.400 (0.358 to 0.444) over 500",
        "actor-0 died (signal 9) and is started again; its log: a.log",
        "actor-0 is ready again (restart 1)",
        "warning: slow",
    ]
    assert progress.state_is_final
    assert progress.summary == {"state": "succeeded"}


def test_the_line_of_a_train_step_has_what_a_person_wants() -> None:
    progress = JobProgress()
    progress.apply(step(12, 0.25))
    assert progress.status == Status(
        "train step", 12, 400, ("reward 0.25 ▃", "1:23 left", "12,346 tok/s", "staleness 0.9 (max 2)", "policy v41")
    )


def test_steps_that_are_taken_again_replace_the_old_ones() -> None:
    progress = JobProgress()
    for number, reward in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        progress.apply(step(number, reward))
    assert progress.rewards == {1: 0.1, 2: 0.25}


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([0.0, 1.0], "▁█"), ([0.5], "▅"), ([0, 0, 0.5, 0.5, 1, 1], "▁▅█"), ([-1.0, 1.0], "▁█"), ([0, 4], "▁█")],
)
def test_sparklines(values: list[float], line: str) -> None:
    assert sparkline(values, 3) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (10810, "3:00:10"), (-1, "0:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_output_is_rare_and_has_no_escape_codes() -> None:
    out, now = io.StringIO(), 0.0
    screen = PlainScreen(out, clock=lambda: now)
    for done in range(1, 31):
        now += 1.0
        screen.status(Status("train step", done, 30, (f"reward {done}",)))
    screen.line("done")
    lines = out.getvalue().splitlines()
    assert lines[0] == "train step 1/30  reward 1"
    assert lines[-2:] == ["train step 30/30  reward 30", "done"]
    assert len(lines) == 2 + 1 + (30 - 1) // int(PLAIN_EVERY_S)
    assert "\x1b" not in out.getvalue()


def test_something_new_is_told_at_once() -> None:
    out = io.StringIO()
    screen = PlainScreen(out, clock=lambda: 0.0)
    screen.status(Status("warm start", 1, 9))
    screen.status(Status("warm start", 2, 9))
    screen.status(Status("training"))
    assert out.getvalue() == "warm start 1/9\ntraining\n"


def test_what_is_no_terminal_gets_plain_output() -> None:
    assert isinstance(make_screen(io.StringIO()), PlainScreen)


@pytest.mark.parametrize("width", [1, 10, 20, 40, 76, 200])
def test_the_moving_line_never_wraps_and_tells_all_on_a_common_terminal(width: int) -> None:
    progress = JobProgress()
    progress.apply(step(12, 0.25))
    lines = fitted(progress.status, width).plain.split("\n  ")
    assert len(lines) <= 2
    assert all(Text(line).cell_len <= width for line in lines)
    if width >= 76:
        assert all(fact in "".join(lines) for fact in progress.status.facts)


def test_the_summary_says_what_came_out_and_what_to_try() -> None:
    rows = summary_rows(SUMMARY, Path.cwd() / "runs" / "j-1", "job.yaml")
    told = dict(row for row in rows if row[0])
    assert told["reward"].startswith("0.311 -> 0.870")
    assert told["held out"].startswith("- -> 0.800")
    assert told["rollouts"] == "26,600 issued = 25,000 trained + 1,600 accounted (evaluation 1,000, zero_variance 600)"
    assert told["took"] == "3:21"
    assert told["results"] == "runs/j-1"
    ideas = "\n".join(text for _, text in rows)
    assert "runs/j-1/reward.png" in ideas
    assert 'from_pretrained("runs/j-1/checkpoint")' in ideas
    assert "longshore run job.yaml --seed 5" in ideas


def test_a_summary_with_holes_is_shown_all_the_same() -> None:
    rows = dict(summary_rows({}, Path("/elsewhere/j"), None))
    assert rows["reward"].startswith("- -> -")
    assert rows["results"] == "/elsewhere/j"
