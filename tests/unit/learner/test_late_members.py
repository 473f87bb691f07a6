"""Rollouts that await their verdict: they close their group, join it late, and are trained once, restart or not."""

import json

import pytest
from builders import TASK, rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.config_credit import GroupMean
from longshore.learner.admission import AWAITING_BATCHES, Admission
from longshore.learner.credit.batch import late_advantage
from longshore.learner.credit.group import Baseline
from longshore.learner.groups import Origin as at
from longshore.learner.ledger import NO_VERDICT, TRAINED, Ledger
from longshore.types import Purpose

BODY = b"a rollout that awaits its verdict"


def with_group(size=4, awaiting=(3,), rewards=(1.0, 0.0, 1.0)):
    ledger = Ledger()
    group = ledger.issue(TASK, Purpose.TRAIN, size)
    for index, reward in enumerate(rewards):
        ledger.receive(rollout(0, index, reward), at(f"1-{index}"))
    for index in awaiting:
        ledger.receive_unscored(0, index, BODY, at(f"1-{index}", "west", len(BODY)))
    return ledger, group


def restored(ledger):
    return Ledger.restore(json.loads(json.dumps(ledger.state())))


def test_a_group_closes_without_those_that_await_their_verdict():
    ledger, _ = with_group()
    assert (ledger.num_ready, ledger.num_awaiting) == (1, 1)
    (group,) = ledger.take_ready(1)
    assert [ending.key for ending in ledger.settle(group, TRAINED)] == ["0.0", "0.1", "0.2"]
    assert ledger.balanced
    assert ledger.late[0].baseline == Baseline((1.0, 0.0, 1.0))
    assert ledger.open == {}


def test_a_verdict_in_time_joins_the_group():
    ledger, _ = with_group()
    ledger.receive(rollout(0, 3, 0.0), at("2-0"))
    (group,) = ledger.take_ready(1)
    assert [index for index, _ in group.members] == [0, 1, 2, 3]
    assert ledger.settle(group, TRAINED)[3].key == "0.3"
    assert ledger.late == {}


def test_a_late_member_is_taken_once_and_compared_with_those_before_it():
    ledger, _ = with_group()
    ledger.settle(ledger.take_ready(1)[0], TRAINED)
    ledger.receive(rollout(0, 3, 0.0), at("1-3", "west", 10))
    ledger.receive(rollout(0, 3, 1.0), at("9-9", "west", 10))
    (member,), endings = ledger.take_late(8)
    assert (member.key, endings) == ("0.3", [])
    assert member.rollout.verdict.reward == 0.0
    assert late_advantage(0.0, member.baseline, GroupMean()) == pytest.approx(-2 / 3)
    ending = ledger.settle_late(0, 3, TRAINED)
    assert (ending.site, ending.entry_id, ending.num_bytes) == ("west", "9-9", 10)
    assert ledger.take_late(8) == ([], [])
    assert ledger.late == {}
    assert ledger.receive(rollout(0, 3), at("9-9")) == TRAINED
    assert ledger.ends == {("home", TRAINED): 3, ("west", TRAINED): 1}


def test_a_verdict_that_comes_during_the_train_step_of_its_group_is_late():
    ledger, _ = with_group()
    (group,) = ledger.take_ready(1)
    ledger.receive(rollout(0, 3, 1.0), at("2-0", "west"))
    assert [index for index, _ in group.members] == [0, 1, 2]
    assert [ending.key for ending in ledger.settle(group, TRAINED)] == ["0.0", "0.1", "0.2"]
    assert ledger.late[0].baseline == Baseline((1.0, 0.0, 1.0))
    assert [member.key for member in ledger.take_late(8)[0]] == ["0.3"]
    assert ledger.balanced


def test_a_restored_ledger_knows_the_statistics_and_what_is_still_awaited():
    ledger, _ = with_group()
    ledger.settle(ledger.take_ready(1)[0], TRAINED)
    again = restored(ledger)
    assert again.balanced
    assert again.late[0].baseline == ledger.late[0].baseline
    assert again.late[0].missing == [3]
    # The broker brings back what was not acknowledged, the trained ones as repeats.
    assert again.receive(rollout(0, 1), at("1-1")) == TRAINED
    assert again.receive_unscored(0, 3, BODY, at("1-3", "west")) is None
    again.receive(rollout(0, 3, 1.0), at("1-3", "west"))
    assert [member.key for member in again.take_late(8)[0]] == ["0.3"]


@pytest.mark.parametrize("verdicts", [2, 4])
def test_a_group_that_all_await_leaves_its_place_until_two_can_be_compared(verdicts):
    ledger, _ = with_group(awaiting=range(4), rewards=())
    assert (ledger.num_active, ledger.num_ready, ledger.take_empty()) == (0, 0, [])
    ledger.receive(rollout(0, 0, 1.0), at("2-0"))
    assert (ledger.num_active, ledger.num_ready) == (0, 0)
    for index in range(1, verdicts):
        ledger.receive(rollout(0, index, 0.0), at(f"2-{index}"))
    assert (ledger.num_active, ledger.num_ready) == (1, 1)
    (group,) = ledger.take_ready(1)
    ledger.settle(group, TRAINED)
    assert ledger.num_awaiting == 4 - verdicts


def test_the_last_verdict_makes_a_lonely_member_ready():
    ledger, _ = with_group(size=2, awaiting=(1,), rewards=())
    ledger.end_ticket(0, 0, "attempts_exhausted", at("1-0"))
    assert ledger.num_ready == 0
    ledger.receive(rollout(0, 1), at("1-1"))
    assert ledger.num_ready == 1


def test_at_the_end_what_awaits_is_accounted_as_such():
    ledger, _ = with_group(awaiting=(3,))
    ledger.issue(TASK, Purpose.TRAIN, 2)
    ledger.receive_unscored(1, 0, BODY, at("3-0"))
    ledger.settle(ledger.take_ready(1)[0], TRAINED)
    endings = {ending.key: ending.outcome for ending in ledger.settle_all("job_finished")}
    assert endings == {"0.3": NO_VERDICT, "1.0": NO_VERDICT, "1.1": "job_finished"}
    assert ledger.balanced
    assert (ledger.open, ledger.late) == ({}, {})


def test_a_late_ticket_that_the_broker_ended_is_accounted():
    ledger, _ = with_group()
    ledger.settle(ledger.take_ready(1)[0], TRAINED)
    ledger.end_ticket(0, 3, "rejected", at("4-0", "west"))
    members, (ending,) = ledger.take_late(8)
    assert (members, ending.outcome, ending.noticed) == ([], "rejected", True)
    assert ledger.balanced
    assert ledger.late == {}


def test_a_recorded_batch_leaves_out_who_was_not_in_it():
    ledger, _ = with_group()
    ledger.receive(rollout(0, 3, 1.0), at("2-3"))
    record = ([0], [(0, 0), (0, 1), (0, 2)], [])
    (group,), late = ledger.take_recorded(*record)
    assert ([index for index, _ in group.members], late) == ([0, 1, 2], [])
    ledger.settle(group, TRAINED)
    (taken,), (member,) = with_another(ledger), ledger.take_late(1)[0]
    assert (taken.group_id, member.key) == (1, "0.3")


def with_another(ledger):
    group = ledger.issue(TASK, Purpose.TRAIN, 1)
    ledger.receive(rollout(group.group_id, 0), at("8-0"))
    return ledger.take_ready(1)


def test_a_recorded_late_member_is_waited_for():
    ledger, _ = with_group()
    ledger.settle(ledger.take_ready(1)[0], TRAINED)
    ledger = restored(ledger)
    ledger.issue(TASK, Purpose.TRAIN, 1)
    ledger.receive(rollout(1, 0), at("5-0"))
    record = ([1], [(1, 0)], [(0, 3)])
    assert ledger.take_recorded(*record) is None
    ledger.receive_unscored(0, 3, BODY, at("1-3"))
    # Its verdict was lost, and nobody knows when it is given again.
    with pytest.raises(LookupError, match="awaits its verdict again"):
        ledger.take_recorded(*record)
    ledger.receive(rollout(0, 3), at("1-3"))
    groups, (member,) = ledger.take_recorded(*record)
    assert ([group.group_id for group in groups], member.key) == ([1], "0.3")


@pytest.mark.parametrize("record", [([0], [(0, 0)], []), ([1], [(1, 0)], [(0, 1)]), ([7], [(7, 0)], [])])
def test_a_record_of_what_ended_otherwise_is_given_up(record):
    ledger, _ = with_group()
    ledger.settle(ledger.take_ready(1)[0], TRAINED)
    ledger.issue(TASK, Purpose.TRAIN, 1)
    with pytest.raises(LookupError):
        ledger.take_recorded(*record)


def test_what_the_broker_should_count_is_what_it_was_told_or_told_us():
    ledger, _ = with_group(awaiting=(), rewards=(1.0, 0.0))
    ledger.end_ticket(0, 2, "attempts_exhausted", at("1-2", "west"))
    ledger.end_ticket(0, 3, "attempts_exhausted", at("1-3"))
    noticed = {("west", "attempts_exhausted"): 1, ("home", "attempts_exhausted"): 1}
    assert ledger.known_at_broker == noticed
    endings = ledger.settle(ledger.take_ready(1)[0], TRAINED)
    assert ledger.known_at_broker == noticed
    ledger.acknowledged(endings)
    assert ledger.known_at_broker == ledger.ends == {**noticed, ("home", TRAINED): 2}


def test_too_many_that_await_take_places_after_all():
    admission = Admission(groups_per_step=4, target_staleness=1, group_size=8)
    bound = AWAITING_BATCHES * 4 * 8
    assert admission.allowance(steps_left=100, in_flight=0, awaiting=bound) == 8
    assert admission.allowance(steps_left=100, in_flight=0, awaiting=bound + 9) == 6
    assert admission.allowance(steps_left=100, in_flight=0, awaiting=10 * bound) == 0


moves = st.lists(
    st.tuples(st.sampled_from(["score", "unscored", "end", "train", "restart"]), st.integers(0, 3), st.integers(0, 2)),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(moves)
def test_every_ticket_ends_once_whatever_comes_in_whatever_order(steps):
    ledger = Ledger()
    for _ in range(4):
        ledger.issue(TASK, Purpose.TRAIN, 3)
    ended = []
    for number, (move, group_id, index) in enumerate(steps):
        origin = at(f"{number}-0")
        if move == "score":
            ledger.receive(rollout(group_id, index, float(number % 2)), origin)
        elif move == "unscored":
            ledger.receive_unscored(group_id, index, BODY, origin)
        elif move == "end":
            ledger.end_ticket(group_id, index, "attempts_exhausted", origin)
        elif move == "restart":
            ledger = restored(ledger)
        else:
            late, endings = ledger.take_late(2)
            ended += endings
            ended += [ledger.settle_late(member.group_id, member.index, TRAINED) for member in late]
            groups = ledger.take_ready(ledger.num_ready) + ledger.take_empty()
            ended += [ending for group in groups for ending in ledger.settle(group, TRAINED)]
        assert ledger.balanced
    ended += ledger.settle_all("job_finished")
    assert sorted(ending.key for ending in ended) == [f"{group}.{index}" for group in range(4) for index in range(3)]
    assert ledger.issued == ledger.ends.total() == 12
