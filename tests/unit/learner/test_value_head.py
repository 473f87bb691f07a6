"""The value head: its advantages over a batch, that it learns, and that a restart does not change it."""

import math

import credit_reference as reference
import pytest
import torch
from builders import TASK, rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.config import TrainSpec
from longshore.config_credit import Gae
from longshore.config_model import NewModel
from longshore.learner import trainer as trainer_module
from longshore.learner.checkpoint import load_newest, restore_snapshot, take_snapshot, write_checkpoint
from longshore.learner.model import _new_model, character_tokenizer
from longshore.learner.sequences import Credit, sequences_of
from longshore.learner.streams import TokenStreams
from longshore.learner.trainer import Trainer
from longshore.learner.value_head import generalised_advantages

MODEL = NewModel(hidden_size=32, layers=1, heads=4, kv_heads=2, intermediate_size=64, max_context=32)
SPEC = TrainSpec(steps=100, learning_rate=1e-2, advantage="gae", objective="reinforce")


def streams(rewards, rollouts, sequences):
    zeros = torch.zeros(len(rewards))
    numbers = torch.zeros(len(rewards), dtype=torch.long)
    return TokenStreams(
        behaviour=zeros,
        temperature=zeros,
        versions=numbers,
        advantages=zeros,
        weights=zeros,
        rewards=torch.tensor(rewards, dtype=torch.float64),
        sequences=torch.tensor(sequences, dtype=torch.long),
        groups=numbers,
        rollouts=torch.tensor(rollouts, dtype=torch.long),
        turns=numbers,
        carried=numbers.bool(),
    )


def test_a_rollouts_segments_follow_each_other_by_hand():
    # Rollout 0: sequence 1 (values 0.5, 0.6), then sequence 3 (value 0.2, reward 1). Rollout 1 lies between them.
    advantages, returns = generalised_advantages(
        streams([1.0, 0.0, 0.0, 0.0], [0, 1, 0, 0], [3, 2, 1, 1]),
        torch.tensor([0.2, 0.4, 0.5, 0.6], dtype=torch.float64),
        Gae(lam=0.5, whiten=False),
    )
    # Errors of rollout 0 in order: 0.1, -0.4, 0.8.
    assert advantages.tolist() == pytest.approx([0.8, -0.4, 0.1 + 0.5 * (-0.4 + 0.5 * 0.8), -0.4 + 0.5 * 0.8])
    assert returns.tolist() == pytest.approx([1.0, 0.0, 0.6, 0.6])


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 2), st.integers(0, 1)), max_size=10))
def test_advantages_of_a_batch_match_plain_loops(rows):
    # Sequence numbers of a rollout: 2 * rollout, or one more.
    rewards, values, rollouts, seconds = zip(*rows, strict=True) if rows else ((),) * 4
    sequences = [2 * number + second for number, second in zip(rollouts, seconds, strict=True)]
    got, _ = generalised_advantages(
        streams(rewards, rollouts, sequences), torch.tensor(values, dtype=torch.float64), Gae(gamma=0.9, whiten=False)
    )
    for number in set(rollouts):
        mine = sorted((place for place in range(len(rows)) if rollouts[place] == number), key=lambda p: sequences[p])
        want = reference.gae([rewards[p] for p in mine], [values[p] for p in mine], 0.9, 0.95)
        assert [got[place].item() for place in mine] == pytest.approx(want, abs=1e-9)


def test_whitened_advantages_have_mean_0_and_deviation_1():
    batch = streams([1.0, 0.0, 0.3, 0.0], [0, 0, 1, 1], [0, 0, 1, 1])
    got, returns = generalised_advantages(batch, torch.zeros(4, dtype=torch.float64), Gae(lam=1.0))
    assert got.mean().item() == pytest.approx(0.0, abs=1e-9)
    assert got.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    # What the head is to learn stays as it was.
    assert returns.tolist() == pytest.approx([1.0, 0.0, 0.3, 0.0])


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer([TASK])


def new_trainer(tokenizer, spec=SPEC, seed=0):
    torch.set_num_threads(1)
    return Trainer(_new_model(MODEL, tokenizer, seed), spec)


def batch():
    good = rollout(0, 0, prompt=(5, 6, 9), reply=(7, 8, 1), logprobs=(-4.0, -4.0, -4.0))
    bad = rollout(0, 1, prompt=(5, 6, 9), reply=(9, 1), logprobs=(-4.0, -4.0))
    return [
        *sequences_of(good, Credit([0.0] * 3, [0.0, 0.0, 1.0])),
        *sequences_of(bad, Credit([0.0] * 2, [0.0, 0.0]), position=1),
    ]


def bits(trainer):
    return b"".join(parameter.detach().numpy().tobytes() for _, parameter in trainer.named_parameters())


def test_the_value_head_learns_what_is_to_come(tokenizer):
    trainer = new_trainer(tokenizer, SPEC.model_copy(update={"advantage": Gae(lam=1.0, value_coefficient=10.0)}))
    metrics = [trainer.step(number, batch(), 0) for number in range(1, 41)]
    # At first it answers 0: three returns of 1 and two of 0.
    assert metrics[0]["value/loss"] == pytest.approx(0.6)
    assert metrics[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    # The first token of both stands behind the same prompt: 0.1 cannot be told apart.
    assert metrics[-1]["value/loss"] < 0.15
    assert metrics[-1]["value/explained_variance"] > 0.5
    assert all(math.isfinite(value) for line in metrics for value in line.values())


def test_what_was_rewarded_becomes_likelier(tokenizer):
    trainer = new_trainer(tokenizer)
    before = sum(trainer_module.canary_logprobs(trainer.policy, [5, 6, 9, 7, 8, 1])[2:])
    for number in range(1, 6):
        trainer.step(number, batch(), 0)
    assert sum(trainer_module.canary_logprobs(trainer.policy, [5, 6, 9, 7, 8, 1])[2:]) > before


def test_a_restart_gives_the_same_bits(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer)
    trainer.step(1, batch(), 0)
    write_checkpoint(tmp_path, take_snapshot(trainer, 1, {}))
    trainer.step(2, batch(), 0)
    other = new_trainer(tokenizer, seed=7)
    restore_snapshot(other, load_newest(tmp_path))
    other.step(2, batch(), 0)
    assert bits(other) == bits(trainer)
