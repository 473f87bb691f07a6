"""Objectives against values worked out by hand, on-policy, and where numbers are extreme."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from longshore.config_objective import AnyObjective, KlSpec, Objective
from longshore.learner.objectives.kl import kl_term
from longshore.learner.objectives.registry import build_objective
from longshore.learner.objectives.tokens import TokenBatch

ADAPTER = TypeAdapter(Objective)
NAMES = [spec.model_fields["name"].default for spec in AnyObjective.__args__]


def spec_of(name, **values):
    return ADAPTER.validate_python({"name": name, **values})


def tokens_of(ratios, advantages, sequences=None, ages=None, keep=None, anchor=None, base=0.1):
    """Tokens of behaviour probability `base` (or one each), of the given ratios pi / mu."""
    mu = torch.as_tensor(base, dtype=torch.float64).expand(len(ratios)).log()
    logp = (mu + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    count = len(ratios)
    return TokenBatch(
        logp=logp,
        behaviour=mu,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sequences=torch.tensor(list(range(count)) if sequences is None else sequences, dtype=torch.long),
        ages=torch.tensor([1] * count if ages is None else ages, dtype=torch.long),
        keep=torch.tensor([True] * count if keep is None else keep, dtype=torch.bool),
        anchor=None if anchor is None else torch.tensor(anchor, dtype=torch.float64),
    )


def run(spec, tokens):
    """Losses, masks and gradients with respect to the log-probs."""
    objective = build_objective(spec)
    if objective.keep is not None:
        tokens = dataclasses.replace(tokens, keep=objective.keep(tokens))
    result = objective.loss(tokens)
    (gradient,) = torch.autograd.grad(result.loss.sum(), tokens.logp)
    return result.loss.tolist(), result.masked.tolist(), gradient.tolist()


def approx(*values):
    return pytest.approx(list(values), rel=1e-6, abs=1e-9)


def test_reinforce_truncates_the_token_ratio_by_hand():
    loss, masked, gradient = run(spec_of("reinforce", ratio_cap=2.0), tokens_of([1.5, 4.0], [2.0, -1.0]))
    assert loss == approx(-1.5 * 2.0 * math.log(0.15), 2.0 * math.log(0.4))
    assert gradient == approx(-3.0, 2.0)
    assert masked == [False, False]


def test_reinforce_truncates_the_sequence_ratio_by_hand():
    # Two tokens of ratios 1.5 and 0.5: s = 0.75 for both. One of ratio 3: truncated at 2.
    batch = tokens_of([1.5, 0.5, 3.0], [1.0, 1.0, -1.0], sequences=[4, 4, 1])
    assert run(spec_of("reinforce", level="sequence", ratio_cap=2.0), batch)[2] == approx(-0.75, -0.75, 2.0)


def test_clip_by_hand():
    batch = tokens_of([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0], base=0.4)
    loss, masked, _ = run(spec_of("clip"), batch)
    assert loss == approx(-1.2, 1.5, -0.5, 0.8)
    assert masked == [True, False, False, True]


def test_dual_clip_bounds_the_loss_of_a_token_that_should_be_rarer():
    loss, masked, gradient = run(spec_of("clip", dual_clip=3.0), tokens_of([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0]))
    assert loss == approx(3.0, 2.0, -1.2)
    assert masked == [True, False, True]
    assert gradient == approx(0.0, 2.0, 0.0)


def test_two_sided_clip_bounds_the_ratio_itself():
    loss, masked, gradient = run(spec_of("clip", two_sided=4.0), tokens_of([5.0, 3.0], [-2.0, -2.0]))
    assert loss == approx(8.0, 6.0)
    assert masked == [True, False]
    assert gradient == approx(0.0, 6.0)


def test_dapo_leaves_more_room_upward():
    assert run(spec_of("dapo"), tokens_of([1.25, 1.3], [1.0, 1.0]))[1] == [False, True]
    assert run(spec_of("grpo"), tokens_of([1.25, 1.3], [1.0, 1.0]))[1] == [True, True]


def test_gspo_clips_a_sequence_by_its_geometric_mean():
    # Ratios 4 and 1/4 cancel: s_g = 1, nothing is clipped, and each token has the gradient of s_g. The other sequence
    # has s_g = sqrt(1.21) = 1.1: clipped.
    batch = tokens_of([4.0, 0.25, 1.21, 1.0], [1.0, 1.0, 1.0, 1.0], sequences=[0, 0, 1, 1])
    loss, masked, gradient = run(spec_of("gspo"), batch)
    assert masked == [False, False, True, True]
    assert loss == approx(-1.0, -1.0, -1.0004, -1.0004)
    assert gradient == approx(-1.0, -1.0, 0.0, 0.0)


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    _, masked, gradient = run(spec_of("cispo"), tokens_of([7.0, 0.01], [1.0, 1.0]))
    assert gradient == approx(-5.0, -0.01)
    assert masked == [False, False]


def test_decoupled_ppo_by_hand():
    # mu 0.1. Anchors 0.2, 0.05, 0.1, 0.6: weights 2, 0.5, 1, 6 (above the cap). pi 0.22, 0.09, 0.11, 0.6.
    anchor = [math.log(value) for value in (0.2, 0.05, 0.1, 0.6)]
    batch = tokens_of([2.2, 0.9, 1.1, 6.0], [1.0, 1.0, -1.0, 1.0], anchor=anchor)
    loss, masked, gradient = run(spec_of("decoupled-ppo"), batch)
    # u = 1.1, 1.8 (clipped at 1.2), 1.1 and 1.
    assert loss == approx(-2.2, -0.6, 1.1, 0.0)
    assert masked == [False, True, False, True]
    assert gradient == approx(-2.2, 0.0, 1.1, 0.0)


def test_without_an_anchor_decoupled_ppo_weighs_and_never_clips():
    loss, masked, gradient = run(spec_of("decoupled-ppo"), tokens_of([3.0, 6.0], [1.0, 1.0]))
    assert loss == approx(-3.0, 0.0)
    assert masked == [False, True]
    assert gradient == approx(-3.0, 0.0)


def test_a3po_interpolates_the_anchor_by_age():
    # r = 1.44. Age 2: anchor half way in logs, w = u = 1.2. Age 1 and 0: anchor mu, u = 1.44, clipped. Age 4:
    # w = 1.44^(3/4), u = 1.44^(1/4).
    batch = tokens_of([1.44] * 4, [1.0] * 4, ages=[2, 1, 0, 4])
    loss, masked, _ = run(spec_of("a-3po", clip_high=0.25), batch)
    assert loss == approx(-1.44, -1.25, -1.25, -1.44)
    assert masked == [False, True, True, False]


def test_topr_tapers_bad_rollouts_only():
    batch = tokens_of([0.5, 0.5, 0.5, 0.5, 3.0], [1.0, 1.0, -1.0, -1.0, -1.0], sequences=[0, 0, 1, 1, 2])
    assert run(spec_of("topr"), batch)[2] == approx(-1.0, -1.0, 0.25, 0.25, 1.0)


def test_m2po_masks_the_fewest_tokens_by_hand():
    # (log r)^2 = 0.01, 0.25, 0.04, 0.01: the mean is 0.0775; without the largest it is 0.02.
    ratios = [math.exp(0.1), math.exp(-0.5), math.exp(0.2), math.exp(-0.1)]
    loss, masked, _ = run(spec_of("m2po"), tokens_of(ratios, [1.0] * 4))
    assert masked == [False, True, False, False]
    assert loss == approx(-ratios[0], 0.0, -ratios[2], -ratios[3])
    assert run(spec_of("m2po", threshold=0.1), tokens_of(ratios, [1.0] * 4))[1] == [False] * 4
    assert run(spec_of("m2po", threshold=0.001), tokens_of(ratios, [1.0] * 4))[1] == [True] * 4


def test_icepop_drops_outside_its_band():
    _, masked, gradient = run(spec_of("icepop"), tokens_of([0.4, 0.6, 4.9, 5.1], [1.0] * 4))
    assert masked == [True, False, False, True]
    assert gradient == approx(0.0, -0.6, -4.9, 0.0)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        # Sequences: (1.2, 1.5) product 1.8; (2, 0.5) product 1; (1.5, 1.5) product 2.25.
        ({"statistic": "product"}, [True, True, False]),
        # Geometric means 1.34, 1, 1.5.
        ({"statistic": "geometric"}, [False, True, False]),
        ({"statistic": "geometric", "low": 0.9, "high": 1.4}, [True, True, False]),
        # k3 means 0.056, 0.25, 0.0945.
        ({"statistic": "k3"}, [False, False, False]),
        ({"statistic": "k3", "high": 0.1}, [True, False, True]),
        ({"statistic": "product", "veto": 0.6}, [True, False, False]),
    ],
)
def test_sequence_masks_drop_whole_sequences(values, kept):
    batch = tokens_of([1.2, 1.5, 2.0, 0.5, 1.5, 1.5], [1.0] * 6, sequences=[0, 0, 1, 1, 2, 2])
    _, masked, gradient = run(spec_of("sequence-mask", **values), batch)
    assert masked == [not kept[place // 2] for place in range(6)]
    weights = [1.2, 1.5, 2.0, 0.5, 1.5, 1.5]
    assert gradient == approx(*[-weights[place] * kept[place // 2] for place in range(6)])


def test_sapo_by_hand():
    # r = 2, tau 1: sigmoid(1) * 4; gradient 4 sigmoid'(1) r.
    sigmoid = 1 / (1 + math.exp(-1))
    loss, _, gradient = run(spec_of("sapo"), tokens_of([2.0], [1.0]))
    assert loss == approx(-4 * sigmoid)
    assert gradient == approx(-4 * sigmoid * (1 - sigmoid) * 2.0)


def test_vespo_by_hand():
    # s = 2: phi = e^3 4 e^-6 for good rollouts, e^2 8 e^-4 for bad ones.
    batch = tokens_of([4.0, 0.5, 2.0], [1.0, 1.0, -1.0], sequences=[0, 0, 1])
    good, bad = 4 * math.exp(-3), 8 * math.exp(-2)
    assert run(spec_of("vespo"), batch)[2] == approx(-good, -good, bad)


def test_kimi_pulls_tokens_or_sequences_back():
    batch = tokens_of([math.e, math.e**2], [1.0, 1.0], sequences=[0, 0])
    assert run(spec_of("kimi", tau=0.1), batch)[2] == approx(-1.0 + 0.1, -1.0 + 0.2)
    # log s = 3 for the sequence: each token's pull is 0.3.
    assert run(spec_of("kimi", tau=0.1, level="sequence"), batch)[2] == approx(-0.7, -0.7)


def test_oapl_regresses_the_sequences_log_ratio_on_its_advantage():
    # log s = 3, beta 0.1, A = 0.5: error -0.2, loss 0.04 in all, gradient 2 * -0.2 * 0.1 a token.
    batch = tokens_of([math.e, math.e**2], [0.5, 0.5], sequences=[0, 0])
    loss, _, gradient = run(spec_of("oapl"), batch)
    assert loss == approx(0.02, 0.02)
    assert gradient == approx(-0.04, -0.04)
    # Where beta log s = A there is nothing left to learn.
    assert run(spec_of("oapl"), tokens_of([math.e**5], [0.5]))[2] == approx(0.0)


def test_dppo_masks_by_probability_not_by_ratio():
    # A rare token that became five times likelier moved by 0.04 only; common ones moved by 0.3, one of them back to
    # where its advantage wants it.
    batch = tokens_of([5.0, 1.5, 0.5, 0.5], [1.0, 1.0, -1.0, 1.0], base=[0.01, 0.6, 0.6, 0.6])
    loss, masked, _ = run(spec_of("dppo", quadratic=0.0), batch)
    assert masked == [False, True, True, False]
    assert loss == approx(-5.0 * math.log(0.05), 0.0, 0.0, -0.5 * math.log(0.3))


def test_dppo_quadratic_pulls_towards_the_behaviour_policy():
    assert run(spec_of("dppo", quadratic=0.1), tokens_of([math.e], [0.0]))[2] == approx(2 * 0.1 * 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_objective_has_the_policy_gradient(name):
    batch = tokens_of([1.0] * 4, [0.7, 0.7, -0.2, 0.0], sequences=[0, 0, 1, 2], ages=[0] * 4, base=[0.3, 0.6, 0.2, 0.9])
    _, masked, gradient = run(spec_of(name), batch)
    # OAPL's is that of its advantage times 2 beta.
    scale = 0.2 if name == "oapl" else 1.0
    assert gradient == approx(*[-scale * advantage for advantage in (0.7, 0.7, -0.2, 0.0)])
    assert not any(masked)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_have_no_loss(name):
    loss, masked, gradient = run(spec_of(name), tokens_of([], []))
    assert (loss, masked, gradient) == ([], [], [])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_extreme_ratios_give_finite_losses_and_gradients_in_float32(name, data):
    count = data.draw(st.integers(1, 6))
    logs = data.draw(st.lists(st.sampled_from([-50.0, -20.0, 0.0, 20.0, 50.0]), min_size=count, max_size=count))
    advantages = data.draw(st.lists(st.sampled_from([-5.0, 0.0, 5.0]), min_size=count, max_size=count))
    sequences = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    # The larger of pi and mu is a certainty, the other all but impossible.
    logp = torch.tensor([min(0.0, log) for log in logs], requires_grad=True)
    batch = TokenBatch(
        logp=logp,
        behaviour=torch.tensor([min(0.0, -log) for log in logs]),
        advantages=torch.tensor(advantages),
        sequences=torch.tensor(sequences),
        ages=torch.tensor(data.draw(st.lists(st.integers(0, 300), min_size=count, max_size=count))),
        keep=torch.ones(count, dtype=torch.bool),
    )
    loss, masked, gradient = run(spec_of(name), batch)
    assert all(math.isfinite(value) for value in [*loss, *gradient])
    if name not in ("dppo", "kimi", "oapl"):
        # These three pull to the behaviour policy whatever the advantage is.
        for place in range(count):
            if masked[place] or advantages[place] == 0:
                assert gradient[place] == 0


def kl_gradient(estimator, ratio_to_reference, unbiased=False, ratio_to_behaviour=1.0):
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(
        logp, logp.detach() - math.log(ratio_to_behaviour), *[torch.zeros(1, dtype=torch.long)] * 3, keep=None
    )
    spec = KlSpec(estimator=estimator, coefficient=2.0, unbiased=unbiased)
    term = kl_term(batch, logp.detach() - math.log(ratio_to_reference), spec)
    (gradient,) = torch.autograd.grad(term.sum(), logp)
    return term.item(), gradient.item()


def test_kl_estimates_by_hand():
    # pi / ref = 2: q = 1/2.
    log2 = math.log(2)
    assert kl_gradient("k2", 2.0) == approx(2 * 0.5 * log2**2, 2 * log2)
    assert kl_gradient("k3", 2.0) == approx(2 * (0.5 - 1 + log2), 2 * (1 - 0.5))
    # Weighted by r = 3: the term and its gradient, which the ratio has a share in.
    assert kl_gradient("k1", 2.0, True, 3.0) == approx(2 * 3 * log2, 2 * 3 * (log2 + 1))
    assert kl_gradient("k3", 2.0, True, 3.0) == approx(6 * (log2 - 0.5), 6 * (log2 - 0.5 + 0.5))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_unbiased_kl_has_the_gradient_of_the_kl_in_expectation(estimator):
    # Three outcomes, sampled from mu: the mean over mu of the term's gradient is the gradient of KL(pi || ref).
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    mu = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    log_pi = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref.log())).sum(), logits, retain_graph=True)
    batch = TokenBatch(log_pi, mu.log(), *[torch.zeros(3, dtype=torch.long)] * 3, keep=None)
    term = kl_term(batch, ref.log(), KlSpec(estimator=estimator, coefficient=1.0, unbiased=True))
    (estimate,) = torch.autograd.grad((mu * term).sum(), logits)
    assert torch.allclose(estimate, exact)
