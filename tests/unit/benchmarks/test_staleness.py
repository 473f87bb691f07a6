"""The benchmark of late rollouts: what is run, what it counts, and when it says nothing."""

import argparse
import json
from dataclasses import asdict, replace

import pytest

from benchmarks.common import Report
from benchmarks.staleness import (
    CANDIDATES,
    DEFAULT,
    Plan,
    Run,
    chosen,
    interval,
    job_of,
    judge,
    kept_runs,
    mean,
    wanted_of,
)
from benchmarks.staleness_game import GAMES
from longshore.config import TrainSpec

PLAN = Plan(("pair",), ("clip", "tis", "topr"), (0, 64, 256), 2, 4000, 1024)


def test_the_interval_is_that_of_a_bootstrap():
    assert interval([2.0, 2.0, 2.0], mean) == (2.0, 2.0)
    low, high = interval([0.0, 1.0] * 50, mean)
    # The mean of 100 such draws has a deviation of 0.05: 90 % lie within 1.645 of it.
    assert low == pytest.approx(0.418, abs=0.02)
    assert high == pytest.approx(0.582, abs=0.02)


def runs(**steps):
    """Runs whose steps to the target are given as name_staleness=(seed 0, seed 1)."""
    made = []
    for key, values in steps.items():
        name, _, staleness = key.rpartition("_")
        for seed, value in enumerate(values):
            course = {"kl": [0.1, float("nan")], "ess": [0.5], "steps": [4000]}
            made.append(Run("pair", name, int(staleness), seed, value, 0.95 if value else 0.5, course))
    return made


GOOD = {
    "clip_0": (2000, 2200),
    "clip_64": (3000, None),
    "clip_256": (None, None),
    "tis_0": (1900, 2100),
    "tis_64": (2300, 2300),
    "tis_256": (3000, 3000),
    "topr_64": (2200, 2300),
    "topr_256": (2800, 2900),
}


def judged(plan=PLAN, **steps):
    report = Report("t", argparse.Namespace(quick=False, json=None))
    judge(report, runs(**{**GOOD, **steps}), plan)
    return {figure.name: figure for figure in report._figures}


def test_candidates_are_compared_with_the_best_on_policy():
    figures = judged()
    row = figures["pair, clip, staleness 64: samples to target"]
    assert row.value == pytest.approx(3500 / 2000)
    assert "1 of 2 never" in row.against
    assert row.holds is None
    assert figures["pair, topr, staleness 64: samples to target"].holds
    assert figures["pair, topr, staleness 256: samples to target"].value == pytest.approx(2850 / 2000)
    assert figures["pair, topr, staleness 256: samples to target"].holds
    assert figures["pair, topr, staleness 256: final reward below on-policy"].holds


def test_what_falls_short_is_said():
    figures = judged(topr_64=(2500, 2600), topr_256=(None, 2900))
    assert figures["pair, topr, staleness 64: samples to target"].holds is False
    assert figures["pair, topr, staleness 256: samples to target"].holds is False
    assert figures["pair, topr, staleness 256: final reward below on-policy"].holds is False


def test_a_task_that_is_learned_too_soon_is_void():
    figures = judged(clip_0=(900, 1000), tis_0=(1000, 1000))
    assert str(figures["pair"].value).startswith("not measured: void")
    assert not any("samples" in name for name in figures)
    assert any("samples" in name for name in judged(replace(PLAN, min_steps=0), clip_0=(900, 1000)))


def test_on_policy_the_runs_of_its_like_count_for_a_candidate():
    figures = judged()
    assert figures["pair, topr, staleness 0: samples to target"].value == 1.0
    made = runs(**GOOD)
    assert [run.candidate for run in chosen(made, "pair", "topr", 0)] == ["tis", "tis"]
    assert [run.candidate for run in chosen(made, "pair", "topr", 64)] == ["topr", "topr"]
    assert chosen(made, "pair", "topr", 16) == []


def test_only_what_is_missing_is_run():
    assert wanted_of("pair", PLAN, []) == [("clip", [0, 64, 256]), ("tis", [0, 64, 256]), ("topr", [64, 256])]
    there = runs(clip_0=(1, 1), clip_64=(1, 1), clip_256=(1, 1), tis_64=(1, 1))
    assert wanted_of("pair", PLAN, there) == [("tis", [0, 256]), ("topr", [64, 256])]
    alone = replace(PLAN, candidates=("topr", "topr, curriculum"))
    assert wanted_of("pair", alone, []) == [("topr", [0, 64, 256]), ("topr, curriculum", [0, 64])]


def test_runs_of_another_plan_are_left_where_they_are(tmp_path):
    made = runs(clip_0=(1, 1, 1), vespo_0=(1,))
    short = replace(made[0], course={**made[0].course, "steps": [8]})
    path = tmp_path / "runs"
    path.write_text("".join(json.dumps(asdict(run)) + "\n" for run in [*made, short]))
    kept = kept_runs(path, PLAN)
    assert [(run.candidate, run.seed) for run in kept] == [("clip", 0), ("clip", 1)]
    assert kept_runs(tmp_path / "none", PLAN) == []


def test_all_candidates_have_the_same_rate_and_batches():
    trains = [job_of(name, (0,), GAMES[1], replace(PLAN, rate=2.0)).train for name in CANDIDATES]
    rate = 2 * GAMES[1].learning_rate
    assert {(spec.learning_rate, spec.batch_size, spec.steps, spec.warmup_steps) for spec in trains} == {
        (rate, 32, 4000, 32)
    }


def test_the_default_is_what_a_job_has_that_says_nothing():
    late = TrainSpec(steps=1, target_staleness=64).objective
    assert job_of(DEFAULT, (64,), GAMES[1], PLAN).train.objective == late
