"""Small Llama models for the generator's tests, and what `transformers` says of their log-probs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longshore.weights.client import Tensor

VOCABULARY = 40
_VLLM = importlib.util.find_spec("vllm") is not None
# vLLM draws on in processes of its own while a test thinks: its replies have to be long enough for that.
CONTEXT = 256 if _VLLM else 64
# Its attention on a CPU has no smaller heads.
HEAD_DIM = 32 if _VLLM else 16

torch.set_num_threads(1)


def tiny_model(
    seed: int,
    *,
    kv_heads: int = 2,
    tie: bool = True,
    theta: float = 5000.0,
    context: int = CONTEXT,
    vocabulary: int = VOCABULARY,
) -> LlamaForCausalLM:
    """A model whose distributions are neither flat nor certain; equal seeds give equal weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.2,
    )
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # Norms away from one, so that a missing norm weight would show.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def config_json(model: LlamaForCausalLM) -> bytes:
    return json.dumps(model.config.to_dict()).encode()


def named_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """What a learner publishes: tied weights once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def published(model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The tensors as they travel; the model's own weights are rounded to what was published."""
    tensors = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.to(dtype)
            parameter.copy_(rounded)
            data = rounded.contiguous().view(torch.uint8).numpy().tobytes()
            tensors.append(Tensor(name, str(dtype).removeprefix("torch."), tuple(rounded.shape), data))
    return tuple(tensors)


def reference_logprobs(
    model: LlamaForCausalLM, prompt: Sequence[int], reply: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """[len(reply)] log-probs of the reply's tokens under teacher forcing."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
    table = torch.log_softmax(logits / temperature, -1)
    return table.gather(1, torch.tensor(list(reply)).unsqueeze(1)).squeeze(1)


def canary_logprobs(model: LlamaForCausalLM, token_ids: Sequence[int]) -> tuple[float, ...]:
    return tuple(reference_logprobs(model, token_ids[:1], token_ids[1:]).tolist())
