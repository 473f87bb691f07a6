"""The reference and the anchor: whose weights they are, and that a restart does not change them."""

import pytest
import torch
from builders import TASK, rollout

from longshore.config import TrainSpec
from longshore.config_model import NewModel
from longshore.learner.checkpoint import load_newest, restore_snapshot, take_snapshot, write_checkpoint
from longshore.learner.model import _new_model, character_tokenizer
from longshore.learner.sequences import Credit, sequences_of
from longshore.learner.trainer import Trainer

MODEL = NewModel(hidden_size=32, layers=1, heads=4, kv_heads=2, intermediate_size=64, max_context=32)
KL = TrainSpec(steps=10, learning_rate=1e-2, kl={"coefficient": 0.1})
ANCHORED = TrainSpec(steps=10, learning_rate=1e-2, objective={"name": "decoupled-ppo", "anchor_every": 2})


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer([TASK])


def new_trainer(tokenizer, spec, seed=0):
    torch.set_num_threads(1)
    return Trainer(_new_model(MODEL, tokenizer, seed), spec)


def batch():
    good = rollout(0, 0, prompt=(5, 6, 9), reply=(7, 8, 1), logprobs=(-4.0, -4.0, -4.0))
    bad = rollout(0, 1, prompt=(5, 6, 9), reply=(9, 1), logprobs=(-4.0, -4.0))
    return sequences_of(good, Credit([1.0] * 3)) + sequences_of(bad, Credit([-1.0] * 2), position=1)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.parameters()]).clone()


def kept(trainer, which):
    return torch.cat([value.flatten() for value in trainer.frozen.weights[which].values()])


def test_the_reference_is_the_policy_before_the_first_step(tokenizer):
    trainer = new_trainer(tokenizer, KL)
    first = weights(trainer)
    assert trainer.step(1, batch(), 0)["reference_kl/mean"] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(kept(trainer, "reference"), first)
    for number in (2, 3):
        metrics = trainer.step(number, batch(), 0)
        assert torch.equal(kept(trainer, "reference"), first)
    assert metrics["reference_kl/mean"] > 1e-4


def test_the_anchor_is_renewed_every_so_many_steps(tokenizer):
    trainer = new_trainer(tokenizer, ANCHORED)
    before = {}
    for number in (1, 2, 3, 4):
        before[number] = weights(trainer)
        trainer.step(number, batch(), 0)
        assert torch.equal(kept(trainer, "anchor"), before[1 if number < 3 else 3])
    assert not torch.equal(before[1], before[3])


@pytest.mark.parametrize(
    "spec", [TrainSpec(steps=1), TrainSpec(steps=1, objective={"name": "decoupled-ppo", "anchor_every": 1})]
)
def test_who_needs_none_keeps_none(tokenizer, spec):
    trainer = new_trainer(tokenizer, spec)
    trainer.step(1, batch(), 0)
    assert trainer.frozen.names == []


def test_the_pull_keeps_the_policy_near_the_reference(tokenizer):
    far = {}
    for coefficient in (1e-6, 10.0):
        spec = TrainSpec(steps=20, learning_rate=1e-2, kl={"coefficient": coefficient, "estimator": "k2"})
        trainer = new_trainer(tokenizer, spec)
        for number in range(1, 16):
            metrics = trainer.step(number, batch(), 0)
        far[coefficient] = metrics["reference_kl/mean"]
    assert far[10.0] < 0.1 * far[1e-6]


@pytest.mark.parametrize("spec", [KL, ANCHORED], ids=["reference", "anchor"])
def test_a_restart_between_two_anchors_gives_the_same_bits(tokenizer, tmp_path, spec):
    trainer = new_trainer(tokenizer, spec)
    trainer.step(1, batch(), 0)
    write_checkpoint(tmp_path, take_snapshot(trainer, 1, {}))
    trainer.step(2, batch(), 0)
    other = new_trainer(tokenizer, spec, seed=7)
    restore_snapshot(other, load_newest(tmp_path))
    other.step(2, batch(), 0)
    assert torch.equal(weights(other), weights(trainer))


def test_the_effective_sample_size_scales_the_rate(tokenizer):
    spec = TrainSpec(steps=10, learning_rate=1e-2, ess_step={"ratio_cap": 1e6})
    metrics = new_trainer(tokenizer, spec).step(1, batch(), 0)
    assert metrics["optim/lr"] == pytest.approx(1e-2 * metrics["is_ratio/ess"] ** 0.5)
    assert metrics["is_ratio/ess"] < 0.99


def test_the_optimal_baseline_sees_the_models_own_probabilities(tokenizer):
    plain = TrainSpec(steps=10, learning_rate=1e-2, objective="reinforce")
    moved = {}
    for baseline in (None, "group", "batch"):
        trainer = new_trainer(tokenizer, plain.model_copy(update={"optimal_baseline": baseline}))
        trainer.step(1, batch(), 0)
        moved[baseline] = weights(trainer)
    # One group: its baseline is the batch's; and neither is none.
    assert torch.equal(moved["group"], moved["batch"])
    assert not torch.equal(moved["group"], moved[None])
