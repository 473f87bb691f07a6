"""Every objective against plain float64 loops, and its gradient against their finite differences."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_reference import REFERENCES, Tokens, kept_by_second_moment, losses
from pydantic import TypeAdapter

from longshore.config_objective import Objective
from longshore.learner.objectives.registry import build_objective
from longshore.learner.objectives.tokens import TokenBatch

# Each objective with its defaults, and with what the defaults leave out.
VARIANTS = [
    *({"name": name} for name in REFERENCES),
    {"name": "reinforce", "level": "sequence", "ratio_cap": 1.5},
    {"name": "clip", "dual_clip": 1.5, "two_sided": 3.0},
    {"name": "clip", "clip_low": 0.5, "clip_high": 1.0, "dual_clip": 3.0},
    {"name": "gspo", "clip_low": 0.3, "clip_high": 0.3},
    {"name": "cispo", "clip_low": 0.3, "clip_high": 0.5},
    {"name": "m2po", "threshold": 1.0},
    {"name": "sequence-mask", "statistic": "product"},
    {"name": "sequence-mask", "statistic": "geometric", "low": 0.5, "high": 2.0, "veto": 0.1},
    {"name": "sequence-mask", "statistic": "k3", "high": 1.0},
    {"name": "kimi", "level": "sequence"},
    {"name": "dppo", "max_probability_gap": 0.05, "quadratic": 0.1},
    {"name": "decoupled-ppo", "with_anchor": True},
]

log_prob = st.floats(-4.0, -0.01)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = sum(lengths)

    def column(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    logp = column(log_prob)
    # Often near the policy, so that not everything is clipped.
    mu = [min(-0.001, value + shift) for value, shift in zip(logp, column(st.floats(-1.0, 1.0)), strict=True)]
    # Sequences may come in any order, and their tokens between each other's.
    sequence = [number for number, length in enumerate(lengths) for _ in range(length)]
    sequence = draw(st.permutations(sequence))
    advantage = column(st.one_of(st.just(0.0), st.floats(-2.0, 2.0)))
    return Tokens(logp, logp, mu, advantage, list(sequence), column(st.integers(0, 5)), column(log_prob))


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def bound(variant, tokens):
    """The spec, and the tokens with an anchor only where the variant has one."""
    variant = dict(variant)
    with_anchor = variant.pop("with_anchor", False)
    spec = TypeAdapter(Objective).validate_python(variant)
    return spec, tokens if with_anchor else dataclasses.replace(tokens, anchor=None)


def evaluated(spec, tokens):
    objective = build_objective(spec)
    batch = TokenBatch(
        logp=tensor(tokens.logp).requires_grad_(),
        behaviour=tensor(tokens.mu),
        advantages=tensor(tokens.advantage),
        sequences=tensor(tokens.sequence, torch.long),
        ages=tensor(tokens.age, torch.long),
        keep=torch.ones(len(tokens.logp), dtype=torch.bool),
        anchor=None if tokens.anchor is None else tensor(tokens.anchor),
    )
    if objective.keep is not None:
        batch = dataclasses.replace(batch, keep=objective.keep(batch))
    result = objective.loss(batch)
    (gradient,) = torch.autograd.grad(result.loss.sum(), batch.logp)
    return result.loss.tolist(), gradient.tolist()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=40, deadline=None)
@given(tokens=batches())
def test_objectives_match_plain_loops_and_their_finite_differences(variant, tokens):
    spec, tokens = bound(variant, tokens)
    loss, gradient = evaluated(spec, tokens)
    assert loss == pytest.approx(losses(tokens, spec), rel=1e-9, abs=1e-12)
    for t in range(len(tokens.logp)):
        right, left = slope(tokens, spec, t, 1e-6), slope(tokens, spec, t, -1e-6)
        if abs(right - left) < 1e-4 * max(1.0, abs(right)):  # else a clip's edge lies between
            assert gradient[t] == pytest.approx((right + left) / 2, rel=1e-4, abs=1e-5)


def slope(tokens, spec, t, h):
    moved = list(tokens.logp)
    moved[t] += h
    return (sum(losses(dataclasses.replace(tokens, logp=moved), spec)) - sum(losses(tokens, spec))) / h


@pytest.mark.parametrize("threshold", [0.01, 0.04, 0.3])
@settings(max_examples=60, deadline=None)
@given(tokens=batches())
def test_the_second_moment_mask_is_the_smallest_that_will_do(threshold, tokens):
    spec = TypeAdapter(Objective).validate_python({"name": "m2po", "threshold": threshold})
    batch = TokenBatch(
        tensor(tokens.logp),
        tensor(tokens.mu),
        tensor(tokens.advantage),
        *[tensor(tokens.sequence, torch.long)] * 2,
        None,
    )
    keep = build_objective(spec).keep(batch)
    assert keep.tolist() == kept_by_second_moment(tokens, threshold)
    kept = (batch.log_ratio.square())[keep]
    assert kept.numel() == 0 or kept.mean() < threshold
