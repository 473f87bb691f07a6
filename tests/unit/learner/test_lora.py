"""Adapters: trained as peft trains them; published and saved as the ordinary model that they amount to."""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import pytest
import torch
from builders import rollout
from tiny_llama import tiny_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from longshore.config import ComputeSpec, LoraSpec, TrainSpec
from longshore.errors import ConfigError
from longshore.learner.checkpoint import load_newest, restore_snapshot, take_snapshot, write_checkpoint
from longshore.learner.lora import Adapters, holding, merged_parameters
from longshore.learner.model import save_checkpoint
from longshore.learner.sequences import Credit, TrainSequence, sequences_of
from longshore.learner.trainer import Trainer, canary_logprobs

LORA = LoraSpec(rank=4, alpha=6.0)
# A step whose gradient is the policy gradient alone, neither clipped nor weighted.
SPEC = TrainSpec(
    steps=10, learning_rate=1e-2, max_grad_norm=1e9, objective={"name": "reinforce", "ratio_cap": 1e6}, lora=LORA
)
CANARY = [5, 9, 3, 30, 7, 7, 12]


def base() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_model(3)


def trainer(spec: TrainSpec = SPEC, seed: int = 1) -> Trainer:
    made = Trainer(base(), spec, seed=seed)
    with torch.no_grad():
        # B begins as zero: then A would have no gradient, and merging nothing to add.
        for name, parameter in made.policy.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return made


def theirs(ours: Trainer) -> peft.PeftModel:
    """peft's own model with the same adapters."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6.0, lora_dropout=0.0, target_modules=list(LORA.target_modules), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base(), config)
    mine = dict(ours.policy.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(mine[name.removeprefix("base_model.model.")])
    return model.train()


def batch(ours: Trainer) -> list[TrainSequence]:
    """Two replies to one prompt, with the log-probs that the policy gives them now."""
    made = []
    prompt = tuple(range(3, 25))
    for index, (reply, advantage) in enumerate((((7, 8, 1), 1.0), ((9, 30, 31, 1), -0.5))):
        logprobs = canary_logprobs(ours.policy, [*prompt, *reply])[-len(reply) :]
        one = rollout(0, index, prompt=prompt, reply=reply, logprobs=tuple(logprobs))
        made += sequences_of(one, Credit([advantage] * len(reply)), position=index)
    return made


def plain_loss(model: torch.nn.Module, sequences: list[TrainSequence]) -> torch.Tensor:
    """-mean over the batch's sampled tokens of A log pi, each sequence alone."""
    total, count = torch.zeros(()), 0
    for one in sequences:
        ids = torch.tensor([one.token_ids])
        table = functional.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        logp = table.gather(1, ids[0, 1:, None]).squeeze(1)
        weights = torch.tensor(one.advantages[1:])
        total = total - (weights * logp).sum()
        count += sum(one.sampled)
    return total / count


def test_a_step_is_pefts_step() -> None:
    ours = trainer()
    other, sequences = theirs(ours), batch(ours)
    trained = {name: parameter for name, parameter in other.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    plain_loss(other, sequences).backward()
    before = {name: parameter.detach().clone() for name, parameter in ours.policy.named_parameters()}
    ours.step(1, sequences, 0)
    optimizer.step()
    assert len(ours.named_parameters()) == len(trained) == 3 * 7 * 2
    for name, parameter in ours.named_parameters():
        expected = trained[f"base_model.model.{name}"]
        assert parameter.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)
        # AdamW divides by the gradient's own size: of the smallest ones only rounding is left.
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-3, atol=2e-4)
        assert not torch.equal(parameter.detach(), before[name])
    for name, parameter in ours.policy.named_parameters():
        if ".lora_" not in name:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name]), "only adapters are trained"


def test_adapters_are_trained_in_bfloat16_too() -> None:
    ours, rounded = trainer(), trainer(SPEC.model_copy(update={"compute": ComputeSpec(dtype="bfloat16")}))
    sequences = batch(ours)
    for one in (ours, rounded):
        one.step(1, sequences, 0)
    for (name, exact), (_, near) in zip(ours.named_parameters(), rounded.named_parameters(), strict=True):
        assert near.grad is not None, name
        assert near.grad.dtype == torch.float32
        assert functional.cosine_similarity(near.grad.flatten(), exact.grad.flatten(), dim=0) > 0.98


def test_merged_weights_are_pefts_under_the_models_own_names() -> None:
    ours = trainer()
    merged = merged_parameters(ours.policy)
    plain = theirs(ours).merge_and_unload()
    assert merged.keys() == dict(base().named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(merged[name], parameter.detach(), rtol=1e-6, atol=1e-7)
    changed = [name for name, value in merged.items() if not torch.equal(value, dict(base().named_parameters())[name])]
    assert len(changed) == 3 * 7


def test_a_policy_without_adapters_is_merged_already() -> None:
    model = base()
    merged = merged_parameters(model)
    assert {name: value.data_ptr() for name, value in merged.items()} == {
        name: parameter.data_ptr() for name, parameter in model.named_parameters()
    }


def test_the_canary_is_that_of_the_weights_as_published() -> None:
    ours = trainer()
    rounded = {name: value.bfloat16().float() for name, value in merged_parameters(ours.policy).items()}
    published = base()
    published.load_state_dict(rounded, strict=False)
    now = canary_logprobs(ours.policy, CANARY)
    with holding(ours.policy, rounded):
        held = canary_logprobs(ours.policy, CANARY)
    assert held == pytest.approx(canary_logprobs(published, CANARY), abs=1e-5)
    assert held != pytest.approx(now, abs=1e-5)
    assert canary_logprobs(ours.policy, CANARY) == now, "its own weights are back"


def test_what_is_saved_loads_as_an_ordinary_model_and_as_adapters(tmp_path: Path) -> None:
    ours = trainer()
    assert ours.adapters is not None
    save_checkpoint(ours.policy, {}, tmp_path / "checkpoint")
    ours.adapters.save(tmp_path / "adapter")
    wanted = canary_logprobs(ours.policy, CANARY)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert canary_logprobs(plain, CANARY) == pytest.approx(wanted, abs=1e-5)
    adapted = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert canary_logprobs(adapted, CANARY) == pytest.approx(wanted, abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_checkpoint_holds_the_adapters_alone_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    first = trainer()
    sequences = batch(first)
    first.step(1, sequences, 0)
    write_checkpoint(tmp_path, take_snapshot(first, 1, {"epoch": 1}))
    first.step(2, sequences, 1)

    snapshot = load_newest(tmp_path)
    assert snapshot is not None
    assert all(".lora_" in name for name in (*snapshot.policy, *snapshot.optimizer))
    second = trainer(seed=9)
    restore_snapshot(second, snapshot)
    second.step(2, sequences, 1)
    for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_adapters_of_another_model_are_refused() -> None:
    snapshot = take_snapshot(trainer(), 0, {})
    other = Trainer(tiny_model(4), SPEC)
    with pytest.raises(ConfigError, match="other weights than the one that its adapters were trained beside"):
        restore_snapshot(other, snapshot)


def test_the_reference_is_kept_as_adapters() -> None:
    ours = trainer(SPEC.model_copy(update={"kl": TrainSpec(steps=1, kl={"coefficient": 0.1}).kl}))
    sequences = batch(ours)
    ours.step(1, sequences, 0)
    assert {".lora_" in name for name in ours.frozen.weights["reference"]} == {True}
    told = ours.step(2, sequences, 1)
    assert told["reference_kl/mean"] > 0


def test_adapters_begin_as_nothing_and_by_the_seed() -> None:
    one, two, other = (Trainer(base(), SPEC, seed=seed) for seed in (1, 1, 2))
    assert canary_logprobs(one.policy, CANARY) == pytest.approx(canary_logprobs(base(), CANARY), abs=1e-5)
    mine, same, differs = (dict(made.named_parameters()) for made in (one, two, other))
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert not all(torch.equal(mine[name], differs[name]) for name in mine)


def test_projections_that_the_model_has_not_are_named() -> None:
    spec = LoraSpec(target_modules=("q_proj", "c_attn", "lm_head"))
    with pytest.raises(ConfigError, match=r"target_modules: .* called c_attn, lm_head; it has down_proj, gate_proj"):
        Adapters(base(), spec, 0)


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"train\.lora needs peft: install longshore\[lora\]"):
        Adapters(base(), LORA, 0)
