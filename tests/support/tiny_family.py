"""A small model of each architecture and variant that the torch engine decodes."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import CONTEXT, VOCABULARY, tiny_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Of eight speeds one stays, two are between, five are divided.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
_MEMBERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama3 rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "linear rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 48}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    # 24 dims a head: not what the kernel takes.
    "narrow heads": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24, "num_attention_heads": 6}),
}
MEMBERS = ("llama", "llama untied", "one kv head", *_MEMBERS)


def member(name: str) -> PreTrainedModel:
    """With norms and biases away from one and zero, so that a missing one would show."""
    llamas: dict[str, dict[str, Any]] = {"llama": {}, "llama untied": {"tie": False}, "one kv head": {"kv_heads": 1}}
    if name in llamas:
        return tiny_model(0, **llamas[name])
    make_config, make_model, own = _MEMBERS[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    config = make_config(**{**sizes, **own})
    config.architectures = [make_model.__name__]
    model: PreTrainedModel = make_model(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model
