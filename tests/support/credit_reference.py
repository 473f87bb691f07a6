"""Credit once more, by sums written out from the formulas: what `learner/credit` is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def std(values: Sequence[float]) -> float:
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / len(values))


def against(value: float, others: Sequence[float], divide: bool) -> float:
    """A value against a set that it is in."""
    return (value - mean(others)) / ((std(others) + 1e-6) if divide else 1.0)


def turn_level(rewards, turn_rewards, turns, weight, divide):
    """turn_rewards[i][k], turns[i] the turn of each token."""
    rows = []
    for i, of_tokens in enumerate(turns):
        row = []
        for k in of_tokens:
            value = against(rewards[i], rewards, divide)
            if 0 <= k < len(turn_rewards[i]) - 1:
                peers = [own[k] for own in turn_rewards if k < len(own) - 1]
                value += weight * against(turn_rewards[i][k], peers, divide)
            row.append(value)
        rows.append(row)
    return rows


def gigpo(rewards, turn_rewards, states, turns, weight, gamma, divide):
    def after(i, k):
        own = turn_rewards[i] or [0.0] * (len(states[i]) - 1) + [rewards[i]]
        return sum(gamma ** (later - k) * own[later] for later in range(k, len(own)))

    rows = []
    for i, of_tokens in enumerate(turns):
        row = []
        for k in of_tokens:
            value = against(rewards[i], rewards, divide)
            if k >= 0 and states[i][k] is not None:
                peers = [
                    after(j, other)
                    for j, of_rollout in enumerate(states)
                    for other, state in enumerate(of_rollout)
                    if state == states[i][k]
                ]
                value += weight * against(after(i, k), peers, divide)
            row.append(value)
        rows.append(row)
    return rows


def process(rewards, token_rewards, outcome, gamma, divide):
    """token_rewards[i][t], at every token."""
    pool = [value for row in token_rewards for value in row]
    return [
        [
            outcome * against(rewards[i], rewards, divide)
            + sum(gamma ** (later - t) * against(row[later], pool, divide) for later in range(t, len(row)))
            for t in range(len(row))
        ]
        for i, row in enumerate(token_rewards)
    ]


def gae(rewards, values, gamma, lam):
    """The sum over all later errors, for each token by itself."""
    ahead = [*values, 0.0]
    errors = [reward + gamma * ahead[t + 1] - ahead[t] for t, reward in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (later - t) * errors[later] for later in range(t, len(errors))) for t in range(len(errors))
    ]
