"""Reading config.json and weights, and scoring against `transformers`."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_family import LLAMA3, MEMBERS, member
from tiny_llama import config_json, named_tensors, published, reference_logprobs, tiny_model

from longshore.errors import ConfigError, IntegrityError
from longshore.generator import llama_forward
from longshore.generator.llama_config import read_config
from longshore.generator.llama_weights import TorchViews, build_weights
from longshore.weights.client import Tensor


def config(**changes: object) -> bytes:
    document = json.loads(config_json(tiny_model(0))) | changes
    return json.dumps({key: value for key, value in document.items() if value != "absent"}).encode()


def test_reads_what_transformers_writes() -> None:
    shape = read_config(config_json(tiny_model(0, kv_heads=1, tie=False, theta=123.0)))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rope_theta) == (4, 1, 16, 123.0)
    assert not shape.tie_embeddings
    assert shape.max_position_embeddings == 64


def test_reads_older_checkpoints() -> None:
    shape = read_config(
        config(rope_parameters="absent", rope_theta=77.0, rope_scaling=None, num_key_value_heads=None, head_dim=None)
    )
    assert (shape.rope_theta, shape.num_kv_heads, shape.head_dim) == (77.0, 4, 16)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            "decodes LlamaForCausalLM, .*this model is GemmaForCausalLM: set generator.engine to vllm",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "this model is gpt2"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            "rope type 'yarn' .*set generator.engine to vllm",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "'llama3' without positive factor, low_freq"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 that is not below"),
        ({"rope_parameters": {**LLAMA3, "factor": math.nan}}, "without positive"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0}},
            "'linear' without positive factor",
        ),
        ({"sliding_window": 16}, "sliding_window 16"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "kv heads"),
        ({"head_dim": 15}, "heads of 15 dims"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": "absent"}, "hidden_size"),
    ],
)
def test_refuses_other_models_by_name(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_config(config(**changes))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_refuses_what_is_no_config(content: bytes) -> None:
    with pytest.raises(ConfigError):
        read_config(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_published_tensors_are_widened_exactly(dtype: torch.dtype) -> None:
    model = tiny_model(3)
    tensors = TorchViews().of(published(model, dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    shape = read_config(config_json(model))
    scored = torch.tensor(llama_forward.score(shape, build_weights(shape, tensors), (1, 2, 3, 4)))
    torch.testing.assert_close(scored, reference_logprobs(model, (1,), (2, 3, 4)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("x", "float64", (1,), b"\0" * 8),
        Tensor("x", "float32", (2,), b"\0" * 4),
        Tensor("x", "float32", (1,), b""),
    ],
)
def test_malformed_tensors_are_refused(tensor: Tensor) -> None:
    with pytest.raises(IntegrityError, match="tensor x"):
        TorchViews().of([tensor])


def test_tensors_that_do_not_fit_the_config_are_refused() -> None:
    model = tiny_model(0)
    shape, tensors = read_config(config_json(model)), named_tensors(model)
    with pytest.raises(IntegrityError, match=r"unknown: model\.extra"):
        build_weights(shape, tensors | {"model.extra": torch.zeros(1)})
    with pytest.raises(IntegrityError, match=r"wrong shape: model\.norm\.weight is"):
        build_weights(shape, tensors | {"model.norm.weight": torch.zeros(3)})
    untied = read_config(config(tie_word_embeddings=False))
    with pytest.raises(IntegrityError, match=r"missing: lm_head\.weight"):
        build_weights(untied, tensors)
    # Some checkpoints hold a tied head as well.
    build_weights(shape, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})


def test_weights_do_not_change_with_the_tensors_they_were_made_from() -> None:
    model = tiny_model(0)
    tensors = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    shape = read_config(config_json(model))
    weights = build_weights(shape, tensors)
    before = llama_forward.score(shape, weights, (1, 2, 3))
    for tensor in tensors.values():
        tensor.zero_()
    assert llama_forward.score(shape, weights, (1, 2, 3)) == before


def test_matrices_are_used_again_where_nothing_changed() -> None:
    """Also a matrix of several tensors, which is made anew when one of them has changed."""
    model, other = tiny_model(0), tiny_model(1)
    shape = read_config(config_json(model))
    views = TorchViews()
    first, changed = published(model), {tensor.name: tensor for tensor in published(other)}
    before = build_weights(shape, views.of(first))
    name = "model.layers.1.self_attn.k_proj.weight"
    second = [changed[name] if tensor.name == name else tensor for tensor in first]
    after = build_weights(shape, views.of(second), before)
    assert after.embedding is before.embedding
    assert after.layers[0] == before.layers[0]
    assert after.layers[1].gate_up is before.layers[1].gate_up
    assert after.layers[1].qkv is not before.layers[1].qkv
    alone = build_weights(shape, TorchViews().of(second))
    assert torch.equal(after.layers[1].qkv, alone.layers[1].qkv)
    assert not torch.equal(after.layers[1].qkv, before.layers[1].qkv)
    # Equal bytes in another place in memory are no reason: only the very same tensor is known not to have changed.
    copied = build_weights(shape, TorchViews().of(first), before)
    assert copied.embedding is not before.embedding
    assert torch.equal(copied.embedding, before.embedding)


@pytest.mark.parametrize("name", MEMBERS)
def test_scores_are_those_of_transformers(name: str) -> None:
    model = member(name)
    shape = read_config(config_json(model))
    tokens = tuple((3 * number + number**2) % 40 for number in range(40))
    scored = torch.tensor(llama_forward.score(shape, build_weights(shape, named_tensors(model)), tokens))
    torch.testing.assert_close(scored, reference_logprobs(model, tokens[:1], tokens[1:]), atol=1e-4, rtol=0)


def test_a_config_may_leave_out_what_its_architecture_says() -> None:
    absent = {"head_dim": "absent", "num_key_value_heads": "absent", "max_position_embeddings": "absent"}
    sizes = {"hidden_size": 64, "num_attention_heads": 32, "sliding_window": None}
    shape = read_config(config(architectures=["Qwen3ForCausalLM"], **absent, **sizes))
    assert (shape.head_dim, shape.num_kv_heads, shape.max_position_embeddings) == (128, 32, 32768)
    shape = read_config(config(architectures=["MistralForCausalLM"], **absent, **sizes))
    assert (shape.head_dim, shape.num_kv_heads, shape.max_position_embeddings) == (2, 8, 131072)
    # On in Mistral's own configs, off in Qwen's, which name a window all the same.
    with pytest.raises(ConfigError, match="sliding_window 16"):
        read_config(config(architectures=["MistralForCausalLM"], sliding_window=16))
    read_config(config(architectures=["Qwen2ForCausalLM"], sliding_window=16, use_sliding_window=False))
