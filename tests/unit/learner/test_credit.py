"""Credit: by hand, against sums written out from the formulas, and where there is nothing to compare."""

import dataclasses
import math

import credit_reference as reference
import pytest
from builders import rollout
from hypothesis import given
from hypothesis import strategies as st

from longshore.config import TrainSpec
from longshore.config_credit import (
    BatchWhitened,
    Gigpo,
    GroupMean,
    GroupMeanStd,
    LeaveOneOut,
    OverlongSpec,
    ProcessRewards,
    SoftValue,
    TurnRewards,
)
from longshore.learner.credit.batch import credit, credit_batch, late_advantage
from longshore.learner.credit.gae import gae
from longshore.learner.credit.group import (
    Baseline,
    above_soft_value,
    centred,
    has_signal,
    leave_one_out,
    overlong_penalty,
    soft_value,
    standardised,
)
from longshore.learner.credit.members import Cohort, Member, member_of, rewards_to_tokens
from longshore.learner.credit.turns import discounted, gigpo, process, turn_level
from longshore.types import FinishReason, GivenSpan, SampledSpan, Segment, Turn, Verdict

rewards = st.lists(st.floats(-3, 3), min_size=1, max_size=6)


def approx(values):
    return [pytest.approx(row, rel=1e-9, abs=1e-9) for row in values]


def test_group_mean_by_hand():
    assert centred([1.0, 0.0, 0.5, 0.5]) == [0.5, -0.5, 0.0, 0.0]


def test_group_mean_std_by_hand():
    # mean 0.5, population deviation 0.5
    assert standardised([1.0, 0.0]) == pytest.approx([1.0, -1.0], abs=1e-5)


def test_leave_one_out_by_hand():
    # The others' means: 0.25, 0.75, 0.5.
    assert leave_one_out([1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    assert leave_one_out([3.0]) == [0.0]


def test_soft_value_by_hand():
    # log((e + 1) / 2)
    assert soft_value([1.0, 0.0], 1.0) == pytest.approx(math.log((math.e + 1) / 2))
    # Hardly tempered it is the best, strongly tempered the mean; a reward of 1e6 overflows nothing.
    assert soft_value([1.0, 0.0], 1e-4) == pytest.approx(1.0, abs=1e-4)
    assert soft_value([1.0, 0.0], 1e6) == pytest.approx(0.5, abs=1e-4)
    assert above_soft_value([1e6, 0.0], 0.05) == pytest.approx([0.05 * math.log(2), -1e6])
    assert soft_value([], 1.0) == 0.0


def test_signal():
    assert has_signal([0.0, 1.0])
    assert not has_signal([0.5, 0.5, 0.5])
    assert not has_signal([1.0])


@given(rewards)
def test_group_credit_matches_its_formulas(values):
    assert centred(values) == pytest.approx([reference.against(v, values, False) for v in values], abs=1e-9)
    assert standardised(values) == pytest.approx([reference.against(v, values, True) for v in values], abs=1e-6)
    others = [[other for j, other in enumerate(values) if j != i] or [value] for i, value in enumerate(values)]
    expected = [value - reference.mean(rest) for value, rest in zip(values, others, strict=True)]
    assert leave_one_out(values) == pytest.approx(expected, abs=1e-9)
    soft = 0.7 * math.log(reference.mean([math.exp(value / 0.7) for value in values]))
    assert above_soft_value(values, 0.7) == pytest.approx([value - soft for value in values], abs=1e-9)


@given(st.floats(-5, 5), st.integers(1, 6))
def test_equal_rewards_have_no_advantage(value, count):
    for rule in (centred, standardised, leave_one_out, lambda values: above_soft_value(values, 0.05)):
        assert rule([value] * count) == pytest.approx([0.0] * count, abs=1e-8)


def test_the_overlong_punishment_by_hand():
    lengths = (10, 16, 18, 20, 25)
    assert [overlong_penalty(length, limit=20, buffer=4, penalty=2.0) for length in lengths] == [0, 0, -1, -2, -2]


# -- turns -----------------------------------------------------------------------------------------------------------

# Two rollouts of two turns: (3 tokens, 1) and (1, 2).
FIRST = Member(1.0, (0, 0, 0, 1), turn_rewards=(1.0, 5.0), states=("", "a"))
SECOND = Member(0.0, (0, 1, 1), turn_rewards=(0.0, 9.0), states=("", "a"))


def test_turn_level_credit_by_hand():
    # Outcomes +-0.5; the first turns' own rewards +-0.5. The last turn's reward counts for nothing.
    rows = turn_level([FIRST, SECOND], TurnRewards(weight=0.5, std=False))
    assert rows == approx([[0.75] * 3 + [0.5], [-0.75, -0.5, -0.5]])


def test_gigpo_by_hand():
    # Returns with gamma 0.5: first 1 + 2.5 = 3.5 and 5, second 4.5 and 9. In state "": means 4, in "a": 7.
    rows = gigpo([FIRST, SECOND], Gigpo(weight=1.0, gamma=0.5, std=False))
    assert rows == approx([[0.5 - 0.5] * 3 + [0.5 - 2.0], [-0.5 + 0.5, -0.5 + 2.0, -0.5 + 2.0]])


def test_gigpo_compares_only_what_happened_in_the_same_state():
    lonely = dataclasses.replace(SECOND, states=("", "b"))
    nameless = dataclasses.replace(SECOND, states=("", None))
    for other in (lonely, nameless):
        rows = gigpo([FIRST, other], Gigpo(gamma=0.5, std=False))
        # Only the first turns share a state.
        assert rows == approx([[0.0] * 3 + [0.5], [0.0, -0.5, -0.5]])


def test_gigpo_without_turn_rewards_discounts_the_outcome():
    bare = [dataclasses.replace(member, turn_rewards=()) for member in (FIRST, SECOND)]
    # Returns: 0.5 and 1 against 0 and 0.
    rows = gigpo(bare, Gigpo(gamma=0.5, std=False))
    assert rows == approx([[0.5 + 0.25] * 3 + [0.5 + 0.5], [-0.5 - 0.25, -0.5 - 0.5, -0.5 - 0.5]])


def test_process_rewards_by_hand():
    # Turn rewards 1, 5 and 0, 9, mean 3.75: -2.75, 1.25, -3.75, 5.25. Each token gets what comes at it and after it.
    rows = process([FIRST, SECOND], ProcessRewards(std=False, outcome=0.0, gamma=0.5))
    assert rows == approx([[-2.75 + 0.625] * 3 + [1.25], [-3.75 + 2.625, 5.25, 5.25]])
    # Token rewards stand before turn rewards.
    tokens = [
        dataclasses.replace(FIRST, token_rewards=(1.0, 0.0, 0.0, 0.0)),
        dataclasses.replace(SECOND, token_rewards=(0.0, 0.0, 0.6)),
    ]
    mean = 1.6 / 7
    rows = process(tokens, ProcessRewards(std=False, outcome=1.0))
    assert rows[0] == pytest.approx([0.5 + 1 - 4 * mean, 0.5 - 3 * mean, 0.5 - 2 * mean, 0.5 - mean])
    assert rows[1] == pytest.approx([-0.5 + 0.6 - 3 * mean, -0.5 + 0.6 - 2 * mean, -0.5 + 0.6 - mean])


def test_without_rewards_inside_a_rollout_process_credit_is_the_outcome():
    bare = [Member(1.0, (0, 0)), Member(0.0, (0,))]
    assert process(bare, ProcessRewards(std=False)) == approx([[0.5, 0.5], [-0.5]])


def test_discounting_by_hand():
    assert discounted([0.0, 0.0, 1.0], 0.5) == [0.25, 0.5, 1.0]
    assert discounted([1.0, 2.0], 0.0) == [1.0, 2.0]


@st.composite
def groups(draw):
    """Groups of rollouts with turns, some tokens of none, states that recur."""
    members = []
    with_rewards = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        turns = [k for k, length in enumerate(lengths) for _ in range(length)] + [-1] * draw(st.integers(0, 1))
        numbers = draw(st.lists(st.floats(-2, 2), min_size=len(lengths), max_size=len(lengths)))
        states = draw(st.lists(st.sampled_from(["a", "b", None]), min_size=len(lengths), max_size=len(lengths)))
        tokens = draw(st.lists(st.floats(-1, 1), min_size=len(turns), max_size=len(turns)))
        members.append(
            Member(
                draw(st.floats(-2, 2)),
                tuple(turns),
                tuple(numbers) if with_rewards else (),
                tuple(tokens),
                tuple(states),
            )
        )
    return members


@given(groups(), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_credit_within_rollouts_matches_its_formulas(members, std, gamma):
    outcomes = [member.reward for member in members]
    own = [member.turn_rewards for member in members]
    turns = [member.turn_of for member in members]
    states = [member.states for member in members]
    tokens = [member.token_rewards for member in members]
    near = {"rel": 1e-6, "abs": 1e-6}
    for rows, expected in (
        (turn_level(members, TurnRewards(weight=0.7, std=std)), reference.turn_level(outcomes, own, turns, 0.7, std)),
        (
            gigpo(members, Gigpo(weight=0.7, gamma=gamma, std=std)),
            reference.gigpo(outcomes, own, states, turns, 0.7, gamma, std),
        ),
        (
            process(members, ProcessRewards(gamma=gamma, outcome=0.3, std=std)),
            reference.process(outcomes, tokens, 0.3, gamma, std),
        ),
    ):
        for row, want in zip(rows, expected, strict=True):
            assert row == pytest.approx(want, **near)


# -- value head ------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # Errors: 0 + 0.6 - 0.5 = 0.1; 1 - 0.6 = 0.4. lam 0.5: 0.1 + 0.5 * 0.4.
    advantages, returns = gae([0.0, 1.0], [0.5, 0.6], gamma=1.0, lam=0.5)
    assert advantages == pytest.approx([0.3, 0.4])
    assert returns == pytest.approx([0.8, 1.0])
    assert gae([], [], 1.0, 0.95) == ([], [])


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_gae_matches_its_formula_and_its_limits(pairs, gamma, lam):
    earned, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert gae(earned, values, gamma, lam)[0] == pytest.approx(reference.gae(earned, values, gamma, lam), abs=1e-9)
    # lam 1: the return minus the value.
    monte_carlo = [total - value for total, value in zip(discounted(earned, gamma), values, strict=True)]
    assert gae(earned, values, gamma, 1.0)[0] == pytest.approx(monte_carlo, abs=1e-9)
    assert gae(earned, values, gamma, 1.0)[1] == pytest.approx(discounted(earned, gamma), abs=1e-9)


# -- a batch ---------------------------------------------------------------------------------------------------------


def member(reward, tokens=1):
    return Member(reward, (0,) * tokens)


def test_whitening_counts_tokens_by_hand():
    # Tokens: three of reward 1, one of 0, in two groups: mean 0.75, variance 0.1875.
    cohorts = [Cohort((member(1.0, 3),)), Cohort((member(0.0, 1),))]
    rows = credit(cohorts, BatchWhitened())
    deviation = math.sqrt(0.1875) + 1e-6
    assert rows[0] == approx([[0.25 / deviation] * 3])
    assert rows[1] == approx([[-0.75 / deviation]])


def test_whitening_with_a_group_baseline_has_mean_0_and_deviation_1_over_tokens():
    cohorts = [Cohort((member(1.0, 3), member(0.0, 1))), Cohort((member(5.0, 2), member(1.0, 2)))]
    tokens = [value for rows in credit(cohorts, BatchWhitened(group_baseline=True)) for row in rows for value in row]
    assert math.fsum(tokens) == pytest.approx(0.0, abs=1e-9)
    assert reference.std(tokens) == pytest.approx(1.0, abs=1e-5)
    # The group of larger rewards spreads more: its own mean is gone, its scale is not.
    assert max(tokens) == tokens[4]


def test_whitening_a_batch_of_equal_rewards_gives_0():
    assert credit([Cohort((member(2.0), member(2.0)))], BatchWhitened()) == [[[0.0], [0.0]]]


def test_late_members_are_compared_with_those_trained_before():
    baseline = Baseline((1.0, 0.0, 0.5, 0.25))
    for spec, rule in ((GroupMean(), centred), (GroupMeanStd(), standardised)):
        expected = rule(baseline.rewards)
        got = [late_advantage(reward, baseline, spec) for reward in baseline.rewards]
        assert got == pytest.approx(expected)
    # A late member is not among those that it is compared with.
    assert late_advantage(1.0, Baseline((0.0, 0.5)), LeaveOneOut()) == 0.75
    assert late_advantage(1.0, Baseline((1.0, 0.0)), SoftValue(temperature=1.0)) == pytest.approx(
        1 - math.log((math.e + 1) / 2)
    )
    assert late_advantage(1.0, Baseline((0.0, 0.5)), ProcessRewards(outcome=2.0, std=False)) == 1.5
    # Members that were all alike have no scale to divide by; nobody at all is a mean of 0.
    for spec in (GroupMeanStd(), TurnRewards(), Gigpo(), ProcessRewards()):
        assert late_advantage(1.0, Baseline((0.0, 0.0)), spec) == 1.0
        assert late_advantage(1.0, Baseline(()), spec) == 1.0


def scored(index, reward, reply=(7, 1), **verdict):
    base = rollout(0, index, reply=reply, logprobs=(-0.5,) * len(reply))
    return dataclasses.replace(base, verdicts=(Verdict(reward, "test@1", **verdict),))


def spec(**values):
    return TrainSpec(steps=1, **values)


def test_a_batch_leaves_out_what_has_no_signal_and_numbers_the_rest():
    groups = [[scored(0, 1.0), scored(1, 1.0)], [scored(0, 1.0), scored(1, 0.0, reply=(7, 8, 1))]]
    late = [(scored(2, 0.5), Baseline((0.5, 0.5))), (scored(2, 1.0), Baseline((0.0, 0.5)))]
    credited = credit_batch(groups, late, spec())
    assert (credited.signals, credited.late_signals) == ([False, True], [False, True])
    assert credited.rewards == [[1.0, 1.0], [1.0, 0.0]]
    assert [(one.rollout, one.group) for one in credited.sequences] == [(0, 1), (1, 1), (2, 3)]
    assert [one.advantages[2:] for one in credited.sequences] == [[0.5, 0.5], [-0.5] * 3, [0.75, 0.75]]


def test_with_whitening_equal_rewards_of_a_group_are_a_signal_beside_another_group():
    groups = [[scored(0, 1.0), scored(1, 1.0)], [scored(0, 0.0), scored(1, 0.0)]]
    assert credit_batch(groups, [], spec(objective="reinforce++")).signals == [True, True]
    assert credit_batch(groups, [], spec()).signals == [False, False]


def test_turn_rewards_are_a_signal_where_outcomes_are_equal():
    turns = (Turn("0", 2, 1, FinishReason.STOP), Turn("0", 3, 1, FinishReason.STOP))
    pair = [
        dataclasses.replace(scored(i, 1.0, turn_rewards=(reward, 0.0)), turns=turns)
        for i, reward in enumerate([1.0, 0.0])
    ]
    credited = credit_batch([pair], [], spec(advantage={"name": "turns", "std": False}))
    assert credited.signals == [True]
    assert [one.advantages for one in credited.sequences] == [[0.0, 0.0, 0.5, 0.0], [0.0, 0.0, -0.5, 0.0]]


def test_long_rollouts_lose_reward_and_are_remembered_so():
    overlong = OverlongSpec(limit=4, buffer=2, penalty=1.0)
    groups = [[scored(0, 1.0), scored(1, 1.0, reply=(7, 8, 1))]]
    credited = credit_batch(groups, [], spec(overlong=overlong))
    assert credited.rewards == [[1.0, 0.5]]
    assert [one.advantages[-1] for one in credited.sequences] == [0.25, -0.25]


def test_for_a_value_head_the_outcome_is_earned_at_the_last_token():
    credited = credit_batch([[scored(0, 1.0), scored(1, 1.0, token_rewards=(0.5, 0.25))]], [], spec(advantage="gae"))
    assert [one.rewards for one in credited.sequences] == [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.5, 1.25]]
    assert credited.signals == [True]


def test_a_rollout_in_numbers():
    spans = (GivenSpan(2), SampledSpan(0, (-1.0, -1.0)), GivenSpan(1), SampledSpan(1, (-1.0,)))
    child = (GivenSpan(1), SampledSpan(1, (-2.0, -2.0)))
    played = dataclasses.replace(
        scored(0, 1.0, turn_rewards=(0.1, 0.2, 0.3)),
        segments=(
            Segment("0", (5, 6, 7, 8, 9, 4), spans),
            Segment("1", (3, 2, 1), child, parent_segment_id="0", prefix_len=3),
        ),
        turns=(
            Turn("0", 2, 2, FinishReason.STOP, {"state": "s1"}),
            Turn("0", 5, 1, FinishReason.STOP, {"state": 5}),
            Turn("1", 1, 2, FinishReason.STOP, {"state": "s3"}),
        ),
    )
    made = member_of(played, None)
    assert made.turn_of == (0, 0, 1, 2, 2)
    assert made.states == ("", "s1", None)
    assert rewards_to_tokens(made) == [0.0, 0.1, 0.2, 0.0, 0.3]
