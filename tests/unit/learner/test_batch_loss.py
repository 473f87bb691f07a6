"""The loss of a batch: normalisation by hand, the same in one pass and in many, VCPO's step and baseline."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import LIMIT, loss_of, sequence

from longshore.config import TrainSpec
from longshore.config_objective import AnyObjective, EssStepSpec
from longshore.learner.batch_loss import Others
from longshore.learner.objectives.normalise import scales, totals_of
from longshore.learner.objectives.variance import ess_share, optimal_baseline, squared_gradients, step_scale

NAMES = [spec.model_fields["name"].default for spec in AnyObjective.__args__]


BATCH = [
    sequence(0, 1.0, [-1.0, -1.0, -1.0], group=0, version=3),
    sequence(1, -0.5, [-2.0], group=0, version=6),
    sequence(2, 0.5, [-0.5, -0.7], group=1, version=7),
    # A second segment of the same rollout.
    sequence(2, 0.5, [-1.5], group=1, version=7),
    sequence(3, -0.25, [-0.9, -0.3], group=1, version=0),
]
LOGPS = [[-0.9, -1.3, -1.0], [-1.7], [-0.5, -0.9], [-1.4], [-0.8, -0.45]]


def test_totals_count_what_can_be_predicted():
    bare = dataclasses.replace(BATCH[0], sampled=[True, True, True, True])
    totals = totals_of([bare, *BATCH[1:]])
    assert (totals.tokens, totals.rollouts, totals.by_rollout.tolist()) == (9, 4, [3, 1, 3, 2])
    assert (totals_of([]).tokens, totals_of([]).rollouts) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tokens", [1 / 9] * 9),
        ("rollouts", [1 / 12] * 3 + [1 / 4] + [1 / 12] * 3 + [1 / 8] * 2),
        ("rollout-sums", [1 / 4] * 9),
        ("constant", [1 / 40] * 9),
    ],
)
def test_scales_by_hand(kind, expected):
    rollouts = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3])
    assert scales(kind, rollouts, totals_of(BATCH), LIMIT).tolist() == pytest.approx(expected)


def test_a_rollout_without_loss_tokens_is_not_counted():
    silent = sequence(1, 1.0, [])
    assert scales("rollouts", torch.tensor([0]), totals_of([BATCH[0], silent]), None).tolist() == pytest.approx([1 / 3])


def test_the_batchs_loss_by_hand():
    # REINFORCE without truncation biting: -r A log pi, each token a ninth, weights on top.
    spec = TrainSpec(steps=1, objective={"name": "reinforce", "ratio_cap": 100.0})
    batch = [dataclasses.replace(one, weights=[w * 2 for w in one.weights]) for one in BATCH]
    total, gradients, loss = loss_of(spec, batch, LOGPS, [[0, 1, 2, 3, 4]])
    by_hand = 0.0
    for one, values, got in zip(batch, LOGPS, gradients, strict=True):
        for place, value in enumerate(values, 1):
            ratio = math.exp(value - one.behaviour[place])
            by_hand -= 2 / 9 * ratio * one.advantages[place] * value
            assert got[place - 1] == pytest.approx(-2 / 9 * ratio * one.advantages[place], rel=1e-5)
    assert total == pytest.approx(by_hand, rel=1e-5)
    metrics = loss.metrics()
    assert metrics["loss/total"] == pytest.approx(by_hand, rel=1e-5)
    assert metrics["perf/trained_tokens"] == 9


VARIANTS = [{"objective": name} for name in NAMES] + [
    {"objective": {"name": "m2po", "threshold": 0.02}},
    {"objective": "reinforce", "optimal_baseline": "group"},
    {"objective": "gspo", "optimal_baseline": "batch", "kl": {"coefficient": 0.1}},
    *({"objective": {"name": "clip", "normalise": kind}} for kind in ("rollouts", "rollout-sums", "constant")),
]
PARTS = [[[0], [1], [2], [3], [4]], [[4, 0], [3, 1, 2]], [[2, 4], [1], [0, 3]]]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_many_passes_have_the_loss_and_the_gradient_of_one(variant, parts):
    spec = TrainSpec(steps=1, **variant)

    def others(part):
        reference = torch.cat([torch.tensor(LOGPS[number]) - 0.3 for number in part])
        return Others(reference=reference if spec.kl else None, anchor=reference + 0.25)

    whole = loss_of(spec, BATCH, LOGPS, [[0, 1, 2, 3, 4]], others)
    split = loss_of(spec, BATCH, LOGPS, parts, others)
    assert split[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    for got, want in zip(split[1], whole[1], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert split[2].metrics() == pytest.approx(whole[2].metrics(), rel=1e-4, abs=1e-6)
    assert split[2].step_scale() == whole[2].step_scale() == 1.0


def test_ages_are_versions_published_since_and_never_negative():
    # A-3PO of age 1 and 0 meets the plain clip; of age 4 it does not. Version 20 came from a life after this one.
    objective = {"name": "a-3po", "clip_high": 0.1}
    masked = []
    for version in (6, 7, 20, 3):
        batch = [sequence(0, 1.0, [-1.0], version=version)]
        _, gradients, _ = loss_of(TrainSpec(steps=1, objective=objective), batch, [[-0.8]], [[0]])
        masked.append(gradients[0][0] == 0)
    assert masked == [True, True, True, False]


def test_metrics_tell_mismatch_at_equal_version_and_effective_samples():
    spec = TrainSpec(steps=1, kl={"coefficient": 0.5, "estimator": "k2"})
    total, _, loss = loss_of(
        spec,
        BATCH[1:3],
        [LOGPS[1], LOGPS[2]],
        [[0], [1]],
        lambda part: (
            Others(torch.tensor([-1.7], requires_grad=False)) if part == [0] else Others(torch.tensor([-0.4, -0.9]))
        ),
    )
    metrics = loss.metrics()
    k3 = [math.exp(d) - 1 - d for d in (0.3, 0.0, -0.2)]
    assert metrics["mismatch_kl/mean"] == pytest.approx(sum(k3) / 3, rel=1e-4)
    assert metrics["mismatch_kl/same_version"] == pytest.approx(sum(k3[1:]) / 2, rel=1e-4)
    assert metrics["reference_kl/mean"] == pytest.approx((math.exp(0.1) - 1 - 0.1) / 3, rel=1e-3)
    s = [math.exp(0.3), math.exp(-0.2)]
    assert metrics["is_ratio/ess"] == pytest.approx(sum(s) ** 2 / 2 / sum(value**2 for value in s), rel=1e-5)
    assert total == pytest.approx(metrics["loss/policy"] + 0.5 * 0.5 * 0.1**2 / 3, rel=1e-4)


# -- VCPO ------------------------------------------------------------------------------------------------------------


def test_effective_samples_by_hand():
    # Weights 1, 1, 2: 16 / (3 * 6).
    assert ess_share(torch.tensor([0.0, 0.0, math.log(2)])) == pytest.approx(16 / 18)
    assert ess_share(torch.zeros(5)) == pytest.approx(1.0)
    assert ess_share(torch.tensor([])) == 1.0
    # One sequence outweighs all others, whatever the size of the numbers.
    assert ess_share(torch.tensor([3000.0, 0.0, -3000.0, 5.0])) == pytest.approx(1 / 4)


def test_the_step_shrinks_with_the_effective_samples():
    logs = torch.tensor([0.0, 0.0, math.log(2)])
    assert step_scale(logs, EssStepSpec()) == pytest.approx(math.sqrt(16 / 18))
    assert step_scale(logs, EssStepSpec(base=0.95)) == pytest.approx(math.sqrt(16 / 18 / 0.95))
    assert step_scale(logs, EssStepSpec(base=0.5)) == 1.0
    # Truncated at 1.5: 12.25 / (3 * 4.25).
    assert step_scale(logs, EssStepSpec(ratio_cap=1.5)) == pytest.approx(math.sqrt(12.25 / 12.75))
    spec = TrainSpec(steps=1, ess_step={"ratio_cap": 10.0})
    _, _, loss = loss_of(spec, BATCH, LOGPS, [[0, 1], [2, 3, 4]])
    logs = [sum(values) - sum(one.behaviour) for one, values in zip(BATCH, LOGPS, strict=True)]
    weights = [math.exp(value) for value in logs]
    share = sum(weights) ** 2 / 5 / sum(weight**2 for weight in weights)
    assert loss.step_scale() == pytest.approx(math.sqrt(share), rel=1e-5)


def test_the_norm_at_the_logits_is_that_of_autograd():
    logits = torch.tensor([[0.1, -0.4, 1.3], [2.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([2, 1])
    log_probs = logits.log_softmax(-1)
    logp = log_probs.gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    collision = log_probs.exp().square().sum(-1)
    assert torch.allclose(squared_gradients(logp, collision), gradient.square().sum(-1))


def test_the_optimal_baseline_by_hand():
    # Group 0: sequences 0 (2 tokens, s = 2, g = 1.5, A = 1) and 1 (s = 1, g = 0.5, A = -1):
    # b = (4 * 1.5 - 0.5) / (4 * 1.5 + 0.5) = 5.5 / 6.5. Group 1: one sequence, which has nothing to be compared with.
    got = optimal_baseline(
        torch.tensor([1.0, 1.0, -1.0, 0.3]),
        torch.tensor([math.log(4.0), math.log(0.5), 0.0, 0.2]),
        torch.tensor([1.0, 0.5, 0.5, 0.7]),
        torch.tensor([0, 0, 1, 4]),
        torch.tensor([0, 0, 0, 1]),
    )
    b = 5.5 / 6.5
    assert got.tolist() == pytest.approx([1 - b, 1 - b, -1 - b, 0.3], abs=1e-6)


tokens = st.lists(
    st.tuples(st.floats(-2, 2), st.floats(-3, 3), st.floats(0.01, 2), st.integers(0, 3)), min_size=1, max_size=10
)


@settings(deadline=None)
@given(tokens, st.booleans())
def test_the_optimal_baseline_matches_plain_loops_and_gives_the_least_variance(rows, one_group):
    # Sequence i belongs to group i // 2, or all to one.
    advantages, logs, norms, sequences = zip(*rows, strict=True)
    groups = [0 if one_group else number // 2 for number in sequences]
    got = optimal_baseline(
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(logs, dtype=torch.float64),
        torch.tensor(norms, dtype=torch.float64),
        torch.tensor(sequences),
        torch.tensor(groups),
    )
    for place, group in enumerate(groups):
        upper = lower = 0.0
        numbers = {n for n, g in zip(sequences, groups, strict=True) if g == group}
        for number in numbers:
            mine = [row for row in rows if row[3] == number]
            weight = math.exp(2 * sum(row[1] for row in mine)) * sum(row[2] for row in mine)
            upper += weight * sum(row[0] for row in mine) / len(mine)
            lower += weight
        baseline = upper / lower if len(numbers) > 1 else 0.0
        assert got[place].item() == pytest.approx(advantages[place] - baseline, abs=1e-6)


def test_extreme_ratios_leave_the_baseline_finite():
    got = optimal_baseline(
        torch.tensor([1.0, -1.0, 0.5, 0.3]),
        torch.tensor([5000.0, -5000.0, 0.0, 0.0]),
        torch.tensor([1.0, 1.0, 0.0, 0.0]),
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([0, 0, 1, 1]),
    )
    # Sequence 0 is all of its group's weight. Sequences without a gradient count alike.
    assert got.tolist() == pytest.approx([0.0, -2.0, 0.1, -0.1])
