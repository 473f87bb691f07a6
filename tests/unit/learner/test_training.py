"""The trainer, its checkpoints, the batch record: the same state and batch give the same bits."""

import json

import pytest
import torch
from builders import TASK, rollout

from longshore.config import TrainSpec
from longshore.config_model import NewModel
from longshore.learner.batch import micro_batches
from longshore.learner.batch_log import BatchLog, BatchRecord
from longshore.learner.checkpoint import KEEP, load_newest, restore_snapshot, take_snapshot, write_checkpoint
from longshore.learner.model import _new_model, character_tokenizer
from longshore.learner.sequences import Credit, sequences_of
from longshore.learner.trainer import Trainer, canary_logprobs

SPEC = TrainSpec(steps=10, learning_rate=1e-3)
MODEL = NewModel(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, max_context=32)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer([TASK])


def new_trainer(tokenizer, seed=0):
    torch.set_num_threads(1)
    return Trainer(_new_model(MODEL, tokenizer, seed), SPEC)


def batch():
    good = sequences_of(
        rollout(0, 0, prompt=(5, 6, 9), reply=(7, 8, 1), logprobs=(-2.0, -3.0, -1.5)), Credit([1.0] * 3)
    )
    bad = sequences_of(rollout(0, 1, prompt=(5, 6, 9), reply=(9, 1), logprobs=(-3.0, -2.5)), Credit([-1.0] * 2))
    return good + bad


def bits(trainer):
    return b"".join(parameter.detach().numpy().tobytes() for parameter in trainer.policy.parameters())


def test_training_makes_what_was_rewarded_likelier(tokenizer):
    trainer = new_trainer(tokenizer)
    tokens = [5, 6, 9, 7, 8, 1]
    before = sum(canary_logprobs(trainer.policy, tokens)[2:])
    for number in range(1, 6):
        metrics = trainer.step(number, batch(), policy_version=0)
    assert sum(canary_logprobs(trainer.policy, tokens)[2:]) > before
    assert metrics["perf/trained_tokens"] == 5
    assert metrics["optim/skipped"] == 0


def test_same_state_and_batch_give_the_same_bits(tokenizer):
    first, second = new_trainer(tokenizer), new_trainer(tokenizer)
    for trainer in (first, second):
        for number in range(1, 4):
            trainer.step(number, batch(), 0)
    assert bits(first) == bits(second)


def test_a_step_after_a_restored_checkpoint_gives_the_same_bits(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer)
    trainer.step(1, batch(), 0)
    write_checkpoint(tmp_path, take_snapshot(trainer, 1, {"note": 1}))
    trainer.step(2, batch(), 0)
    other = new_trainer(tokenizer, seed=7)
    snapshot = load_newest(tmp_path)
    assert (snapshot.step, snapshot.state) == (1, {"note": 1})
    restore_snapshot(other, snapshot)
    other.step(2, batch(), 0)
    assert bits(other) == bits(trainer)


def test_a_snapshot_is_not_moved_by_later_steps(tokenizer):
    trainer = new_trainer(tokenizer)
    trainer.step(1, batch(), 0)
    snapshot = take_snapshot(trainer, 1, {})
    kept = {name: tensor.clone() for name, tensor in snapshot.policy.items()}
    trainer.step(2, batch(), 0)
    assert all(torch.equal(snapshot.policy[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(tokenizer, tmp_path, damage):
    trainer = new_trainer(tokenizer)
    write_checkpoint(tmp_path, take_snapshot(trainer, 1, {}))
    newest = write_checkpoint(tmp_path, take_snapshot(trainer, 2, {}))
    victim = newest / "model.safetensors"
    content = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        victim.write_bytes(content[:100])
    else:
        victim.unlink()
    assert load_newest(tmp_path).step == 1


def test_a_checkpoint_that_a_superseded_learner_wrote_last_is_not_the_newest(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer)
    for step, epoch in ((1, 1), (5, 2), (2, 1)):
        write_checkpoint(tmp_path, take_snapshot(trainer, step, {"epoch": epoch}))
    assert load_newest(tmp_path).step == 5
    newest = write_checkpoint(tmp_path, take_snapshot(trainer, 6, {"epoch": 2}))
    assert len(list(tmp_path.glob("checkpoint_*"))) == KEEP
    (newest / "state.json").unlink()
    assert load_newest(tmp_path).step == 5
    (newest / "manifest.json").write_text("[")
    assert load_newest(tmp_path).step == 5


def test_a_half_written_checkpoint_is_not_seen(tokenizer, tmp_path):
    part = tmp_path / ".checkpoint_000001.part"
    part.mkdir()
    (part / "state.json").write_text("{}")
    assert load_newest(tmp_path) is None
    write_checkpoint(tmp_path, take_snapshot(new_trainer(tokenizer), 3, {}))
    assert load_newest(tmp_path).step == 3


def test_a_gradient_that_is_not_a_number_is_skipped_and_said(tokenizer):
    trainer = new_trainer(tokenizer)
    before = bits(trainer)
    poison = sequences_of(rollout(0, 0, logprobs=(-0.5, float("nan"))), Credit([1.0] * 2))
    assert trainer.step(1, poison, 0)["optim/skipped"] == 1
    assert bits(trainer) == before


def test_a_batch_without_signal_changes_nothing(tokenizer):
    trainer = new_trainer(tokenizer)
    before = bits(trainer)
    assert trainer.step(1, [], 0)["perf/trained_tokens"] == 0
    assert bits(trainer) == before


def test_log_probs_are_at_the_temperature_of_the_sample(tokenizer):
    trainer = new_trainer(tokenizer)
    (micro,) = micro_batches(batch()[:1], 1000)
    plain = trainer.compute.scores(micro).logp
    logits = trainer.policy(torch.tensor([[5, 6, 9, 7, 8, 1]])).logits[0]
    assert torch.allclose(plain, torch.log_softmax(logits, -1)[[2, 3, 4], [7, 8, 1]], atol=1e-6)
    micro.streams.temperature.fill_(2.0)
    cooled = trainer.compute.scores(micro).logp
    assert torch.allclose(cooled, torch.log_softmax(logits / 2, -1)[[2, 3, 4], [7, 8, 1]], atol=1e-6)


def test_the_rate_warms_up_and_decays(tokenizer):
    spec = TrainSpec(steps=11, learning_rate=1.0, final_learning_rate=0.5, warmup_steps=2)
    trainer = Trainer(_new_model(MODEL, tokenizer, 0), spec)
    assert [round(trainer.learning_rate(step), 3) for step in (1, 2, 6, 11)] == [0.5, 0.95, 0.75, 0.5]


def record(step, *groups):
    return BatchRecord(step, 1, groups, tuple((f"{group}.0", 1) for group in groups))


def test_the_batch_record_gives_back_the_steps_beyond_the_checkpoint(tmp_path):
    log = BatchLog(tmp_path / "batches.jsonl")
    for step in (1, 2, 3):
        log.append(record(step, step, step + 10))
    assert log.after(1) == [record(2, 2, 12), record(3, 3, 13)]


def test_a_torn_batch_record_is_dropped_and_the_file_goes_on(tmp_path):
    path = tmp_path / "batches.jsonl"
    log = BatchLog(path)
    log.append(record(1, 1))
    with path.open("a") as file:
        file.write('{"step":2,"epo')
    assert log.after(0) == [record(1, 1)]
    log.append(record(2, 5))
    assert log.after(0) == [record(1, 1), record(2, 5)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_the_tokenizer_knows_letters_and_folds_what_all_prompts_share():
    from longshore.types import Message, Task

    tasks = [
        Task(str(i), (Message("user", f"Spell this backward: {word}"),), word) for i, word in enumerate(["ab", "cd"])
    ]
    tokenizer = character_tokenizer(tasks)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Spell this backward: sun"}], add_generation_prompt=True, return_dict=False
    )
    assert len(ids) == 5
    assert tokenizer.decode(ids[1:4]) == "sun"
    assert tokenizer.decode(tokenizer.encode("nus" + tokenizer.eos_token), skip_special_tokens=True) == "nus"
