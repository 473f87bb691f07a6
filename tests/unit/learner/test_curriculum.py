"""Curricula: chances by hand, tasks near the target more often, and the same tasks after a restart."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.config_curriculum import CurriculumSpec
from longshore.learner.curriculum import MAX_PASSED, Curriculum, chance
from longshore.learner.difficulty import TaskBook
from longshore.learner.issue_log import IssueLog, IssueRecord
from longshore.tasks.source import FirstTasks, TrainCursor
from longshore.types import Message, Task


class Numbers:
    version = "1"

    def __init__(self, size=None):
        self.size = size

    def task(self, ordinal):
        if self.size is not None and ordinal >= self.size:
            return None
        return Task(str(ordinal), (Message("user", f"{ordinal}+1="),))


def known(**successes):
    book = TaskBook()
    for name, success in successes.items():
        book.observe(name.removeprefix("t"), [success])
    return book


def test_chances_by_hand():
    spec = CurriculumSpec(target=0.5, least=0.1)
    assert [chance(p, spec) for p in (None, 0.5, 0.75, 0.25, 1.0, 0.0)] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    hard = CurriculumSpec(target=0.2, least=0.05)
    assert [chance(p, hard) for p in (0.2, 0.6, 1.0)] == pytest.approx([1.0, 0.5, 0.05])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_no_task_is_left_without_a_chance(success, target, least):
    assert least <= chance(success, CurriculumSpec(target=target, least=least)) <= 1.0


def test_tasks_near_the_target_come_more_often():
    cursor = TrainCursor(Numbers(4), 0.0, seed=1)
    book = known(t0=1.0, t1=0.5, t2=0.75)
    curriculum = Curriculum(cursor, book, CurriculumSpec(), seed=1)
    seen = collections.Counter(cursor.at(curriculum.next()).task_id for _ in range(2600))
    # Chances of 0.1, 1, 0.5, and 1 for the one that nothing is known of.
    assert {name: count / 1000 for name, count in seen.items()} == pytest.approx(
        {"0": 0.1, "1": 1.0, "2": 0.5, "3": 1.0}, abs=0.06
    )


def test_a_position_is_the_cursors_and_can_be_had_again():
    cursor = TrainCursor(Numbers(50), 0.3, seed=3)
    curriculum = Curriculum(cursor, known(**{f"t{n}": n / 50 for n in range(50)}), CurriculumSpec(), seed=3)
    positions = [curriculum.next() for _ in range(30)]
    assert positions == sorted(set(positions))
    assert cursor.state == positions[-1] + 1
    # Whatever is known by then.
    again = TrainCursor(Numbers(50), 0.3, seed=3)
    assert [again.at(position) for position in positions] == [cursor.at(position) for position in positions]
    assert again.state == 0


def test_what_nobody_wants_is_taken_in_the_end():
    cursor = TrainCursor(Numbers(3), 0.0, seed=1)
    spec = CurriculumSpec(least=1e-9)
    assert Curriculum(cursor, known(t0=1.0, t1=1.0, t2=0.0), spec, seed=1).next() == MAX_PASSED


def test_an_endless_source_is_walked_round_and_round_in_a_pool():
    cursor = TrainCursor(FirstTasks(Numbers(), 5), 0.0, seed=2)
    rounds = [[cursor.next().task_id for _ in range(5)] for _ in range(2)]
    assert [sorted(tasks) for tasks in rounds] == [list("01234")] * 2
    assert FirstTasks(Numbers(3), 5).size == 3


def test_positions_are_on_record(tmp_path):
    log = IssueLog(tmp_path / "issued.jsonl")
    record = IssueRecord(1, 0, 2, 8, "train", positions=(4, 9))
    log.append(record)
    assert log.after(0) == [record]
