"""The split by text, and the cursor that a checkpoint stores as one number."""

from __future__ import annotations

from itertools import pairwise

import pytest

from longshore.errors import ConfigError
from longshore.tasks.source import TrainCursor, heldout_tasks, is_heldout, prompt_text
from longshore.types import Message, Task


class Numbers:
    """Tasks `0+0=`, `0+1=`, ...; `texts` of them differ."""

    version = "1"

    def __init__(self, size: int | None, texts: int = 10_000) -> None:
        self.size = size
        self._texts = texts

    def task(self, ordinal: int) -> Task | None:
        if self.size is not None and ordinal >= self.size:
            return None
        return Task(str(ordinal), (Message("user", f"{ordinal % self._texts}+1="),))


def take(cursor: TrainCursor, count: int) -> list[str]:
    return [cursor.next().task_id for _ in range(count)]


@pytest.mark.parametrize("size", [None, 300])
def test_training_never_sees_a_heldout_text(size: int | None) -> None:
    source = Numbers(size, texts=200)
    heldout = {prompt_text(task) for task in heldout_tasks(source, 0.2, 20)}
    assert len(heldout) == 20
    cursor = TrainCursor(source, 0.2, seed=3)
    trained = {prompt_text(cursor.next()) for _ in range(1000)}
    assert not heldout & trained
    assert len(trained) > 100


def test_the_share_is_about_the_fraction() -> None:
    source = Numbers(None)
    shares = sum(is_heldout(source.task(number), 0.1) for number in range(5000)) / 5000  # type: ignore[arg-type]
    assert 0.08 < shares < 0.12
    assert not any(is_heldout(source.task(number), 0.0) for number in range(1000))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("at", [0, 3, 6, 7, 30])
def test_a_cursor_restored_from_its_state_goes_on_where_it_stood(size: int | None, at: int) -> None:
    first = TrainCursor(Numbers(size), 0.3, seed=5)
    take(first, at)
    restored = TrainCursor(Numbers(size), 0.3, first.state, seed=5)
    assert take(restored, 25) == take(first, 25)


def test_a_finite_source_is_seen_whole_each_round_in_another_order() -> None:
    cursor = TrainCursor(Numbers(50), 0.0, seed=1)
    rounds = [take(cursor, 50) for _ in range(4)]
    assert all(sorted(round_, key=int) == [str(number) for number in range(50)] for round_ in rounds)
    assert all(before != after for before, after in pairwise(rounds))
    assert take(TrainCursor(Numbers(50), 0.0, seed=2), 50) != rounds[0]


@pytest.mark.parametrize("size", [None, 60])
def test_no_training_task_is_passed_over(size: int | None) -> None:
    source = Numbers(size)
    tasks = [task for number in range(60) if (task := source.task(number)) and not is_heldout(task, 0.3)]
    cursor = TrainCursor(source, 0.3)
    assert 30 < len(tasks) < 60
    assert sorted(take(cursor, len(tasks)), key=int) == [task.task_id for task in tasks]


def test_an_endless_source_is_walked_in_its_order() -> None:
    assert take(TrainCursor(Numbers(None), 0.0), 5) == ["0", "1", "2", "3", "4"]


def test_too_few_heldout_tasks_say_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"500 held-out tasks are wanted.* leaves \d+ with different texts"):
        heldout_tasks(Numbers(300), 0.2, 500)
    # Endless, but with ten texts only: the scan ends.
    with pytest.raises(ConfigError, match="leaves"):
        heldout_tasks(Numbers(None, texts=10), 0.5, 50)


def test_heldout_texts_are_distinct() -> None:
    texts = [prompt_text(task) for task in heldout_tasks(Numbers(None, texts=100), 0.5, 30)]
    assert len(set(texts)) == 30


def test_nothing_left_to_train_on_is_an_error_not_a_hang() -> None:
    with pytest.raises(ConfigError, match="no task is left"):
        TrainCursor(Numbers(40, texts=1), 1.0).next()
    with pytest.raises(ConfigError, match="empty"):
        TrainCursor(Numbers(0), 0.0).next()


def test_roles_are_part_of_the_text() -> None:
    user, system = Task("a", (Message("user", "x"),)), Task("b", (Message("system", "x"),))
    assert prompt_text(user) != prompt_text(system)
