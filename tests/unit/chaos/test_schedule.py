"""The schedule is a pure function of the seed, and keeps its promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.schedule import (
    APART,
    KILLS,
    LEARNER,
    LEARNER_SHARE,
    Kind,
    Place,
    Target,
    apportion,
    mix,
    num_kills,
    plan,
    targets_at_home,
)

PLACES = [Place("link", Kind.PARTITION, 4, (5.0, 25.0)), Place("disk", Kind.DISK_FULL, 3, (3.0, 8.0))]


def test_the_same_seed_gives_the_same_schedule_and_another_seed_another():
    one, again, other = (plan(seed, 100, targets_at_home(), PLACES, 5.0) for seed in (7, 7, 8))
    assert one == again
    assert one != other
    assert mix(one) == mix(other), "the seed decides on order and times, not on how much is done to whom"


@given(seed=st.integers(0, 2**32), kills=st.integers(1, 400))
def test_exactly_the_kills_asked_for_and_few_of_them_the_learners(seed, kills):
    faults = plan(seed, kills, targets_at_home(), PLACES, 5.0)
    assert num_kills(faults) == kills
    learners = sum(fault.target == LEARNER and fault.kind in KILLS for fault in faults)
    assert learners <= LEARNER_SHARE * kills
    assert [fault.number for fault in faults] == list(range(1, len(faults) + 1))
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)


def test_a_learner_that_weighs_too_much_is_held_to_its_share():
    faults = plan(0, 100, [Target(LEARNER, kills=9, stops=1), Target("a", kills=1)], [], 5.0)
    table = mix(faults)
    assert table[LEARNER]["kill"] == 15
    assert table["a"]["kill"] == 85


def test_every_kind_of_fault_is_in_a_schedule_of_100():
    faults = plan(0, 100, targets_at_home(), PLACES, 5.0)
    assert {fault.kind for fault in faults} == set(Kind)
    assert all(5 <= fault.seconds <= 25 for fault in faults if fault.kind is Kind.PARTITION)
    assert all(fault.seconds == 0 for fault in faults if fault.kind in KILLS)


def test_kills_keep_the_pace_and_targets_their_distance():
    faults = plan(3, 200, targets_at_home(), [], 5.0)
    kills = [fault for fault in faults if fault.kind in KILLS]
    assert 4.0 < kills[-1].at_s / len(kills) < 6.0
    near = sum(
        kill.target in {other.target for other in kills[max(0, index - APART + 1) : index]}
        for index, kill in enumerate(kills)
    )
    assert near <= 0.05 * len(kills)


@pytest.mark.parametrize("total", [0, 1, 7, 100])
def test_apportion_gives_out_exactly_the_total(total):
    shares = apportion(total, {"a": 1.0, "b": 2.5, "c": 0.0})
    assert sum(shares.values()) == total
    assert shares["c"] == 0


def test_nobody_to_kill_is_an_error():
    with pytest.raises(ValueError, match="weight"):
        plan(0, 5, [Target(LEARNER, kills=0)], [], 5.0)
