"""What is known of tasks: estimates by hand, bounded, and the same after a restart."""

import json

import pytest

from longshore.learner import difficulty
from longshore.learner.difficulty import TaskBook


def test_the_first_groups_count_alike_and_later_ones_for_three_tenths():
    book = TaskBook()
    assert book.success("a") is None
    for rewards in ([1.0, 0.0], [1.0, 1.0], [0.0, 0.0]):
        book.observe("a", rewards)
    assert book.success("a") == pytest.approx(0.5)
    book.observe("a", [1.0])
    assert book.success("a") == pytest.approx(0.65)


def test_rewards_outside_of_0_and_1_are_held_within():
    book = TaskBook()
    book.observe("a", [5.0, -3.0])
    book.observe("b", [])
    assert (book.success("a"), book.success("b"), len(book)) == (0.5, None, 1)


def test_a_book_is_restored_and_forgets_what_was_attempted_longest_ago(monkeypatch):
    monkeypatch.setattr(difficulty, "REMEMBERED_TASKS", 2)
    book = TaskBook()
    for name, reward in (("a", 1.0), ("b", 0.0), ("a", 0.0), ("c", 0.5)):
        book.observe(name, [reward])
    assert (book.success("a"), book.success("b"), book.success("c")) == (0.5, None, 0.5)
    again = TaskBook()
    again.restore(json.loads(json.dumps(book.state())))
    assert again.state() == book.state()
    assert again.metrics() == {
        "tasks/known": 2.0,
        "tasks/success": 0.5,
        "tasks/solved_frac": 0.0,
        "tasks/hopeless_frac": 0.0,
    }
    assert TaskBook().metrics() == {}
