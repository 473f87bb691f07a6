"""The ledger: the equation holds whatever comes home, and a restored ledger goes on where it stood."""

import json

import pytest
from builders import JOB, TASK, rollout
from hypothesis import given
from hypothesis import strategies as st

from longshore.learner.admission import Admission
from longshore.learner.groups import Origin as at
from longshore.learner.ledger import Ledger
from longshore.types import Purpose


def test_a_group_closes_when_all_its_tickets_are_terminal():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 2)
    assert ledger.receive(rollout(0, 1), at("1-1")) is None
    assert ledger.num_ready == 0
    assert ledger.end_ticket(0, 0, "attempts_exhausted", at("1-2")) is None
    assert ledger.num_ready == 1


def test_settling_gives_each_ticket_one_outcome_and_its_entry():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 2)
    ledger.receive(rollout(0, 1), at("1-1"))
    ledger.end_ticket(0, 0, "attempts_exhausted", at("1-2"))
    (group,) = ledger.take_ready(1)
    endings = ledger.settle(group, "trained")
    assert [(end.key, end.outcome, end.entry_id) for end in endings] == [
        ("0.0", "attempts_exhausted", "1-2"),
        ("0.1", "trained", "1-1"),
    ]
    assert ledger.trained == 1
    assert ledger.accounted == {"attempts_exhausted": 1}
    assert ledger.balanced


def test_a_repeated_delivery_is_told_how_its_ticket_ended():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 1)
    ledger.receive(rollout(0, 0), at("1-1"))
    ledger.settle(ledger.take_ready(1)[0], "zero_variance")
    assert ledger.receive(rollout(0, 0), at("9-9")) == "zero_variance"
    assert ledger.balanced


def test_first_delivery_wins_and_the_newest_entry_is_acknowledged():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 1)
    ledger.receive(rollout(0, 0, reward=1.0), at("1-1"))
    ledger.receive(rollout(0, 0, reward=0.0), at("2-1"))
    (group,) = ledger.take_ready(1)
    assert group.rollouts[0].verdict.reward == 1.0
    assert [end.entry_id for end in ledger.settle(group, "trained")] == ["2-1"]


def test_members_do_not_depend_on_the_order_of_arrival():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 3)
    for index in (2, 0, 1):
        ledger.receive(rollout(0, index), at(f"{index}-0"))
    assert [index for index, _ in ledger.take_ready(1)[0].members] == [0, 1, 2]


def test_a_recorded_batch_is_taken_whole_or_not_at_all():
    ledger = Ledger()
    for _ in range(3):
        ledger.issue(TASK, Purpose.TRAIN, 1)
    ledger.receive(rollout(2, 0), at("1-0"))
    record = ([2, 0], [(2, 0), (0, 0)], [])
    assert ledger.take_recorded(*record) is None
    ledger.receive(rollout(0, 0), at("2-0"))
    groups, late = ledger.take_recorded(*record)
    assert ([group.group_id for group in groups], late) == ([2, 0], [])
    assert ledger.num_ready == 0


def test_a_recorded_batch_waits_for_no_verdict_that_was_lost():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 2)
    record = ([0], [(0, 0), (0, 1)], [])
    ledger.receive(rollout(0, 0), at("1-0"))
    assert ledger.take_recorded(*record) is None
    ledger.receive_unscored(0, 1, b"x", at("2-0"))
    with pytest.raises(LookupError, match=r"0\.1 awaits its verdict again"):
        ledger.take_recorded(*record)


def test_evaluation_groups_are_never_trained_on():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.EVALUATION, 1)
    ledger.receive(rollout(0, 0, purpose=Purpose.EVALUATION), at("1-0"))
    assert ledger.num_ready == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.booleans()), max_size=40), st.integers(0, 40))
def test_the_equation_holds_and_survives_a_checkpoint(arrivals, cut):
    ledger = Ledger()
    for _ in range(6):
        ledger.issue(TASK, Purpose.TRAIN, 2)
    for number, (group_id, index, lost) in enumerate(arrivals):
        if lost:
            ledger.end_ticket(group_id, index, "attempts_exhausted", at(f"{number}-0"))
        else:
            ledger.receive(rollout(group_id, index), at(f"{number}-0"))
        if number == cut:
            while ledger.num_ready:
                ledger.settle(ledger.take_ready(1)[0], "trained")
        assert ledger.balanced
    restored = Ledger.restore(json.loads(json.dumps(ledger.state())))
    assert restored.balanced
    assert (restored.issued, restored.outcomes, list(restored.open)) == (
        ledger.issued,
        ledger.outcomes,
        list(ledger.open),
    )
    restored.settle_all("job_finished")
    assert restored.issued == restored.trained + sum(restored.accounted.values())


def test_restored_groups_have_their_tasks_and_wait_for_their_rollouts():
    ledger = Ledger()
    ledger.issue(TASK, Purpose.TRAIN, 2)
    ledger.receive(rollout(0, 0), at("1-0"))
    restored = Ledger.restore(json.loads(json.dumps(ledger.state())))
    assert restored.open[0].task == TASK
    assert restored.open[0].missing == [0, 1]
    assert JOB.job == "job-1"


@given(st.integers(1, 8), st.integers(0, 5), st.lists(st.booleans(), max_size=200))
def test_admission_never_exceeds_its_limit_and_ends_with_nothing_left_over(groups, staleness, moves):
    """Law 6: issued - consumed <= (target staleness + 1) * batch, for any order of arrivals and steps."""
    admission = Admission(groups, staleness)
    steps, taken, issued, home = 10, 0, 0, 0
    for arrives in [*moves, *[True, False] * 1000]:
        issued += admission.allowance(steps - taken, issued - taken * groups)
        assert issued - taken * groups <= (staleness + 1) * groups
        if arrives and home < issued:
            home += 1
        elif taken < steps and home - taken * groups >= groups:
            taken += 1
    assert taken == steps
    assert issued == steps * groups
