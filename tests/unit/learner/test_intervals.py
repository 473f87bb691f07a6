"""95 % intervals: against the textbook, and what must hold of any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.learner.intervals import bootstrap, interval_of, wilson


def test_wilson_against_the_textbook():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, number, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(successes, number) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_rewards_of_0_and_1_get_wilsons_and_others_a_bootstraps():
    assert interval_of([1.0, 0.0, 1.0, 1.0]).method == "wilson"
    found = interval_of([1.0, 0.5, 0.25, 1.0])
    assert found.method == "bootstrap"
    assert found == interval_of([1.0, 0.5, 0.25, 1.0])
    assert interval_of([]) is None


def test_a_bootstrap_is_as_wide_as_the_normal_approximation_of_many_values():
    values = [(7 * n % 100) / 100 for n in range(400)]
    mean = sum(values) / 400
    reach = 1.96 * (sum((value - mean) ** 2 for value in values) / 400) ** 0.5 / 20
    assert bootstrap(values) == pytest.approx((mean - reach, mean + reach), abs=0.006)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_the_rate_lies_between_the_bounds_and_they_between_0_and_1(rewards):
    found = interval_of(rewards)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert found.high - found.low < 1.0
