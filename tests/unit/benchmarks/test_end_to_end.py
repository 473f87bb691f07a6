from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.end_to_end_course import (
    ALPHABET,
    FIRST_LIGHT,
    LETTERS,
    NUM_HELDOUT,
    QUICK,
    Course,
    job_of,
    learning_rate,
)
from benchmarks.end_to_end_sides import Learned
from longshore.config import parse_job
from longshore.learner.trainer import Trainer


def learned(rewards: list[float]) -> Learned:
    steps = [float(step) for step in range(1, len(rewards) + 1)]
    return Learned([2 * step for step in steps], steps, [10 * step for step in steps], rewards, Path(), "")


def test_a_reward_is_reached_when_the_last_batches_have_it_in_the_mean() -> None:
    side = learned([0.9, 0.1, 0.5, 0.8, 0.9])

    assert side.reached(0.85, 2) == 4
    assert side.reached(0.5, 1) == 0
    assert side.reached(0.95, 2) is None


def test_rate_is_of_all_tokens_and_all_seconds() -> None:
    assert learned([0.0, 1.0]).rate == 5.0
    assert learned([0.0, 1.0]).mean_reward == 0.5


@pytest.mark.parametrize("name", [ALPHABET, FIRST_LIGHT, QUICK])
def test_both_sides_have_the_learners_rates(name: str, tmp_path: Path) -> None:
    train = parse_job(job_of(name, tmp_path, 3)).train
    trainer = Trainer.__new__(Trainer)
    trainer.spec = train

    assert [learning_rate(train, step) for step in (1, 2, 11, train.steps)] == [
        trainer.learning_rate(step) for step in (1, 2, 11, train.steps)
    ]


def test_tasks_are_the_letters_from_one_to_another_and_held_out_ones_are_not_trained_on(tmp_path: Path) -> None:
    course = Course(job_of(ALPHABET, tmp_path, 0))
    train, heldout = course.train_tasks(500), course.heldout(NUM_HELDOUT[ALPHABET])

    assert len(heldout) == NUM_HELDOUT[ALPHABET]
    assert not {task.messages[-1].content for task in train} & {task.messages[-1].content for task in heldout}
    for task in train + heldout:
        first, last = (LETTERS.index(letter) for letter in task.messages[-1].content)
        assert task.answer == "".join(LETTERS[first : last + 1])
