"""Objectives against values worked out by hand, plain float64 loops, and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshore.config import ClipObjective, DppoObjective
from longshore.learner.objective import build_objective, clip, dppo


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_dppo_by_hand():
    spec = DppoObjective(max_probability_gap=0.2, ratio_cap=20.0, quadratic=0.0)
    # pi = mu = 0.5: ratio 1, loss = -A * log pi.
    half = math.log(0.5)
    result = dppo(tensor(half, half), tensor(half, half), tensor(2.0, -1.0), spec)
    assert result.loss.tolist() == pytest.approx([-2.0 * half, 1.0 * half], rel=1e-6)
    assert result.masked.tolist() == [False, False]


def test_dppo_masks_by_probability_not_by_ratio():
    spec = DppoObjective(max_probability_gap=0.2, ratio_cap=20.0, quadratic=0.0)
    # A rare token that became five times likelier moved by 0.04 only; a common one moved by 0.3.
    logp = tensor(math.log(0.05), math.log(0.9), math.log(0.3))
    behaviour = tensor(math.log(0.01), math.log(0.6), math.log(0.6))
    result = dppo(logp, behaviour, tensor(1.0, 1.0, -1.0), spec)
    assert result.masked.tolist() == [False, True, True]
    assert result.loss.tolist() == pytest.approx([-5.0 * math.log(0.05), 0.0, 0.0], rel=1e-5)


def test_dppo_mask_is_one_sided():
    spec = DppoObjective(max_probability_gap=0.2, quadratic=0.0)
    # The token moved away from where the advantage wants it: the gradient must be let through to bring it back.
    result = dppo(tensor(math.log(0.3)), tensor(math.log(0.6)), tensor(1.0), spec)
    assert result.masked.tolist() == [False]


def test_dppo_quadratic_pulls_towards_the_behaviour_policy():
    spec = DppoObjective(quadratic=0.1)
    logp = tensor(-1.0).requires_grad_()
    dppo(logp, tensor(-2.0), tensor(0.0), spec).loss.sum().backward()
    assert logp.grad.item() == pytest.approx(2 * 0.1 * 1.0)


def test_clip_by_hand():
    spec = ClipObjective(name="clip", clip_low=0.2, clip_high=0.2)
    behaviour = tensor(0.0, 0.0, 0.0, 0.0)
    logp = torch.log(tensor(1.5, 1.5, 0.5, 0.5))
    result = clip(logp, behaviour, tensor(1.0, -1.0, 1.0, -1.0), spec)
    assert result.loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8], rel=1e-5)
    assert result.masked.tolist() == [True, False, False, True]


def reference_dppo(logp, behaviour, advantage, gap, cap, quadratic, frozen_ratio):
    """One token in plain floats; `frozen_ratio` stands for the stop-gradient."""
    moved = math.exp(logp) - math.exp(behaviour)
    outside = (advantage > 0 and moved > gap) or (advantage < 0 and moved < -gap)
    policy = 0.0 if outside else -min(frozen_ratio, cap) * advantage * logp
    return policy + quadratic * (logp - behaviour) ** 2


@given(
    st.floats(-6, -0.01), st.floats(-6, -0.01), st.floats(-2, 2), st.sampled_from([0.05, 0.2, 1.0]), st.floats(0, 0.1)
)
def test_dppo_matches_a_float64_loop_and_its_finite_difference(logp, behaviour, advantage, gap, quadratic):
    spec = DppoObjective(max_probability_gap=gap, ratio_cap=20.0, quadratic=quadratic)
    value = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    result = dppo(
        value, torch.tensor([behaviour], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), spec
    )
    result.loss.sum().backward()
    ratio = math.exp(logp - behaviour)
    expected = reference_dppo(logp, behaviour, advantage, gap, 20.0, quadratic, ratio)
    assert result.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    moved = math.exp(logp) - math.exp(behaviour)
    if abs(abs(moved) - gap) > 1e-4:  # away from the mask's edge, where the loss jumps
        h = 1e-6
        slope = (
            reference_dppo(logp + h, behaviour, advantage, gap, 20.0, quadratic, ratio)
            - reference_dppo(logp - h, behaviour, advantage, gap, 20.0, quadratic, ratio)
        ) / (2 * h)
        assert value.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_on_policy_both_objectives_have_the_policy_gradient():
    logp = torch.log(tensor(0.3, 0.6)).requires_grad_()
    advantages = tensor(0.7, -0.2)
    grads = []
    for spec in (DppoObjective(quadratic=0.0), ClipObjective(name="clip")):
        (grad,) = torch.autograd.grad(build_objective(spec)(logp, logp.detach(), advantages).loss.sum(), logp)
        grads.append(grad)
    assert torch.allclose(grads[0], grads[1])
    assert torch.allclose(grads[0], -advantages)
