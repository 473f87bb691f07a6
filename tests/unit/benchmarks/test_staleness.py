"""The benchmark of late rollouts: what it forces, what it counts, and when it says nothing."""

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks.common import Report
from benchmarks.staleness import Plan, Run, interval, judge, mean, train_spec
from benchmarks.staleness_world import GAMES, Course, Setting, World
from longshore.config import TrainSpec

PLAN = Plan(("pair",), ("clip", "default"), (0, 64, 256), 2, 4000, 1024, 1.0)
TRAIN = TrainSpec(steps=8, groups_per_step=2, group_size=4, learning_rate=1e-2, objective="reinforce++")


def test_games_have_the_answers_that_they_say():
    pair, sort, sums = GAMES
    prompts = torch.tensor([[2, 0, 3]])
    assert pair.answers(prompts).tolist() == [[3, 0, 2]]
    assert sort.answers(prompts).tolist() == [[0, 2, 3]]
    assert sums.answers(prompts).tolist() == [[2, 2, 1]]
    assert pair.rewards(prompts, torch.tensor([[3, 0, 0]])).tolist() == pytest.approx([2 / 3])
    assert sort.rewards(prompts, torch.tensor([[0, 2, 2]])).tolist() == [0.0]
    assert sort.rewards(prompts, torch.tensor([[0, 2, 3]])).tolist() == [1.0]


@pytest.mark.parametrize(("staleness", "versions"), [(0, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 0, 0, 0, 1, 2, 3, 4])])
def test_every_rollout_is_as_old_as_was_asked_for(staleness, versions):
    world = World(Setting(GAMES[0], TRAIN, staleness, 0))
    step, seen = world._trainer.step, []

    def watched(number, sequences, version):
        assert version == number - 1
        seen.append({value for one in sequences for value in one.versions if value >= 0})
        return step(number, sequences, version)

    world._trainer.step = watched
    course = world.run()
    assert seen == [{version} for version in versions]
    assert course.steps == [8]
    # Its log-probs are those of the weights of its version: equal ones on-policy, and there only.
    assert (abs(course.kl[0]) < 1e-6) == (staleness == 0)
    assert (course.ess[0] > 1 - 1e-6) == (staleness == 0)


def test_a_policy_learns_in_it():
    train = TrainSpec(steps=96, groups_per_step=8, group_size=8, learning_rate=3e-3, objective="clip")
    course = World(Setting(GAMES[0], train, 0, 0)).run()
    assert course.final() > course.rewards[0] + 0.2


def test_the_target_is_reached_by_the_mean_of_several_looks():
    course = Course(steps=[8, 16, 24, 32], rewards=[0.0, 1.0, 0.8, 0.9])
    assert course.steps_to(0.9, window=2) == 24
    assert course.steps_to(0.9, window=3) == 32
    assert course.steps_to(0.95, window=2) is None
    assert course.final(window=2) == pytest.approx(0.85)


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
        name, _, staleness = key.partition("_")
        for seed, value in enumerate(values):
            course = {"kl": [0.1], "ess": [0.5]}
            made.append(Run("pair", name, int(staleness), seed, value, 0.95 if value else 0.5, course))
    return made


GOOD = {
    "clip_0": (2000, 2200),
    "clip_64": (3000, None),
    "clip_256": (None, None),
    "default_0": (1900, 2100),
    "default_64": (2200, 2300),
    "default_256": (2800, 2900),
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
    assert figures["pair, default, staleness 64: samples to target"].holds
    assert figures["pair, default, staleness 256: samples to target"].value == pytest.approx(2850 / 2000)
    assert figures["pair, default, staleness 256: samples to target"].holds
    assert figures["pair, default, staleness 256: final reward below on-policy"].holds


def test_what_falls_short_is_said():
    figures = judged(default_64=(2500, 2600), default_256=(None, 2900))
    assert figures["pair, default, staleness 64: samples to target"].holds is False
    assert figures["pair, default, staleness 256: samples to target"].holds is False
    assert figures["pair, default, staleness 256: final reward below on-policy"].holds is False


def test_a_task_that_is_learned_too_soon_is_void():
    figures = judged(clip_0=(900, 1000), default_0=(1000, 1000))
    assert str(figures["pair"].value).startswith("not measured: void")
    assert not any("samples" in name for name in figures)
    assert any("samples" in name for name in judged(replace(PLAN, min_steps=0), clip_0=(900, 1000)))


def test_all_candidates_have_the_same_rate_and_batches():
    specs = [train_spec(name, GAMES[1], replace(PLAN, rate=2.0)) for name in PLAN.candidates]
    rate = 2 * GAMES[1].learning_rate
    assert {(spec.learning_rate, spec.batch_size, spec.steps, spec.warmup_steps) for spec in specs} == {
        (rate, 64, 4000, 32)
    }
