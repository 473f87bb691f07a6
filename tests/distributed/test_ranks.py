"""Two and three processes over gloo against one: the same losses, weights and canaries. `make test-distributed`.

A process takes seconds to start, so that many scenarios share a start.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from ranks_bench import CANARY, VOCABULARY, Played, Scenario, play, play_in, policy
from transformers import AutoModelForCausalLM

from longshore.learner.trainer import canary_logprobs

PACKS: dict[str, object] = {"compute": {"pack_tokens": 120}}
GAE = {"objective": {"name": "clip"}, "advantage": {"name": "gae"}}
SCENARIOS = {
    "accumulation": Scenario(PACKS),
    "one group that fits a pack": Scenario({}, groups=1, last=2),
    "head of its own": Scenario(PACKS, tied=False),
    "odd packs": Scenario({"compute": {"pack_tokens": 200}}, groups=3),
    "masks of the whole batch, scaled step": Scenario({**PACKS, "objective": {"name": "m2po"}, "ess_step": {}}),
    "baseline of the whole batch": Scenario({**PACKS, "optimal_baseline": "group"}),
    "reference": Scenario({**PACKS, "kl": {"coefficient": 0.1}}),
    "anchor": Scenario({**PACKS, "objective": {"name": "decoupled-ppo", "anchor_every": 2}}),
    "value head": Scenario({**PACKS, **GAE}),
    "adapters": Scenario({**PACKS, "lora": {"rank": 4}}),
    "warm start": Scenario(PACKS, last=1, warm_start={"steps": 4, "batch_size": 5}),
    "warm start of fewer rows than ranks": Scenario(PACKS, last=1, warm_start={"steps": 2, "batch_size": 1}),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Played]:
    torch.set_num_threads(1)
    return {name: play(scenario) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest) -> dict[str, Played]:
    return dict(zip(SCENARIOS, play_in(request.param, list(SCENARIOS.values())), strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_several_processes_learn_what_one_does(
    alone: dict[str, Played], together: dict[str, Played], name: str
) -> None:
    one, several = alone[name], together[name]
    assert several.warm_losses == pytest.approx(one.warm_losses, rel=1e-5)
    for before, after in zip(one.metrics, several.metrics, strict=True):
        assert after == pytest.approx(before, rel=2e-4, abs=2e-5)
    same_weights(several, one)
    assert several.canary == pytest.approx(one.canary, abs=1e-4)
    assert one.metrics[0]["optim/grad_norm"] > 0.01


def same_weights(made: Played, expected: Played) -> None:
    assert list(made.weights) == list(expected.weights)
    for name, value in expected.weights.items():
        # AdamW divides by a gradient's size: where that is next to nothing, its last bits are a part of the step.
        torch.testing.assert_close(made.weights[name], value, rtol=0, atol=5e-5)


def test_bfloat16_has_its_masters_shared_out() -> None:
    scenario = Scenario({"compute": {"pack_tokens": 120, "dtype": "bfloat16"}}, last=2)
    one, (several,) = play(scenario), play_in(2, [scenario])
    first, other = one.metrics[0], several.metrics[0]
    assert other["loss/total"] == pytest.approx(first["loss/total"], rel=1e-4)
    assert other["optim/grad_norm"] == pytest.approx(first["optim/grad_norm"], rel=1e-3)
    # A canary in float32, of weights that differ by a rounded gradient.
    assert several.canary == pytest.approx(one.canary, abs=0.02)


@pytest.mark.parametrize("train", [{**PACKS, **GAE, "kl": {"coefficient": 0.1}}, {**PACKS, "lora": {"rank": 4}}])
def test_a_checkpoint_goes_from_two_processes_to_one_to_three(tmp_path: Path, train: dict[str, object]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    at_once = play(Scenario(train, last=4))
    begun = Scenario(train, first=1, last=1, write=str(first))
    play_in(2, [begun, Scenario(train, first=2, last=2, read=str(first), write=str(first))])
    assert len(list((first / "checkpoint_000002").glob("shard-*.safetensors"))) == 2
    play(Scenario(train, first=3, last=3, read=str(first), write=str(second)))
    (last,) = play_in(3, [Scenario(train, first=4, last=4, read=str(second))])
    assert last.metrics[0] == pytest.approx(at_once.metrics[3], rel=2e-4, abs=2e-5)
    same_weights(last, at_once)


def test_what_two_processes_save_is_an_ordinary_model_and_adapters(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    (played,) = play_in(2, [Scenario({**PACKS, "lora": {"rank": 4}}, save=str(saved))])
    plain = AutoModelForCausalLM.from_pretrained(saved / "checkpoint")
    assert type(plain).__name__ == plain.config.architectures[0] == "LlamaForCausalLM"
    weights = dict(plain.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in played.weights.items())
    adapted = peft.PeftModel.from_pretrained(policy(tied=True), saved / "adapter")
    assert canary_logprobs(adapted, CANARY) == pytest.approx(canary_logprobs(plain, CANARY), abs=1e-5)
    assert plain.get_input_embeddings().weight.shape[0] == VOCABULARY
