"""The paired test of held-out tasks, against the binomial in whole numbers."""

from __future__ import annotations

import json
from fractions import Fraction
from math import comb

import pytest

from longshore.learner.intervals import interval_of
from longshore.learner.paired import Paired, both_sides, paired
from longshore.learner.progress import Evaluation, Progress


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (4, 5), (0, 8), (21, 60), (60, 21), (180, 260)])
def test_p_is_that_of_the_binomial(b: int, c: int) -> None:
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1))
    assert both_sides(b, c) == pytest.approx(float(min(1, Fraction(2 * tail, 2 ** (b + c)))), rel=1e-9)


def test_p_of_very_many_tasks_is_a_number() -> None:
    assert 0.0 <= both_sides(200_000, 300_000) < 1e-300
    assert both_sides(250_000, 250_000) == pytest.approx(1.0, rel=1e-6)


def test_each_task_is_compared_with_itself() -> None:
    before = [0.0, 0.0, 1.0, 1.0, None, 0.5, 0.0]
    after = [1.0, 0.0, 0.0, 1.0, 1.0, 0.75, None]
    assert paired(before, after) == Paired(tasks=5, worse=1, better=2, p=1.0)


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 0.0])


def evaluated(progress: Progress, when: str, rewards: list[float | None]) -> None:
    scored = [reward for reward in rewards if reward is not None]
    progress.add_evaluation(Evaluation(when, 0, 0, len(rewards), len(scored), interval_of(scored)), rewards)


def test_progress_pairs_what_two_evaluations_left_in_a_checkpoint() -> None:
    progress = Progress()
    evaluated(progress, "before", [0.0, None, 1.0, 0.0])
    progress = Progress.restore(json.loads(json.dumps(progress.state())))
    # Those while training goes on are of other versions.
    evaluated(progress, "step", [1.0, 1.0, 0.0, 0.0])
    assert progress.paired is None
    evaluated(progress, "after", [1.0, 1.0, 1.0, 1.0])
    assert progress.paired == Paired(tasks=3, worse=0, better=2, p=0.5)


def test_a_checkpoint_without_the_tasks_rewards_is_not_paired() -> None:
    state = Progress().state()
    del state["heldout_rewards"]
    progress = Progress.restore({**state, "evaluations": {"before": 0.5}})
    evaluated(progress, "after", [1.0])
    assert progress.paired is None
