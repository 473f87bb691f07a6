"""The pure parts of benchmarks/recovery.py."""

import pytest

from benchmarks.recovery_times import cold_start, redone_steps

LOADING = (2.0, {"type": "phase", "phase": "loading"})
WARM = (3.0, {"type": "phase", "phase": "warm_start"})
STEPS = [(at, {"type": "warm_start", "step": step, "steps": 60}) for at, step in ((4.0, 20), (9.0, 60))]
TRAIN = (10.5, {"type": "phase", "phase": "train"})


def test_a_cold_start_is_what_comes_before_and_after_the_warm_start():
    assert cold_start(1.0, [LOADING, WARM, *STEPS, TRAIN]) == (3.0 - 1.0) + (10.5 - 9.0)


def test_only_the_first_training_counts():
    again = (30.0, {"type": "phase", "phase": "train"})
    assert cold_start(1.0, [LOADING, WARM, *STEPS, TRAIN, again]) == 3.5


@pytest.mark.parametrize("events", [[], [LOADING, TRAIN], [LOADING, WARM, *STEPS], [WARM, TRAIN]])
def test_a_job_without_a_whole_warm_start_has_none(events):
    with pytest.raises(ValueError, match="no warm start"):
        cold_start(1.0, events)


@pytest.mark.parametrize(
    ("recorded", "first", "redone"),
    [([1, 2, 3], 4, 0), ([1, 2, 3], 3, 1), ([8, 9, 10, 11, 9, 10], 9, 3), ([], 1, 0), ([5], 9, 0)],
)
def test_redone_steps_are_those_that_were_recorded_before(recorded, first, redone):
    assert redone_steps(recorded, first) == redone
