"""Reading config.json and weights, and the decoder against `transformers`."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_llama import VOCABULARY, config_json, named_tensors, published, reference_logprobs, tiny_model

from longshore.errors import ConfigError, IntegrityError
from longshore.generator import llama_forward
from longshore.generator.llama_config import read_config
from longshore.generator.llama_weights import TorchViews, build_weights
from longshore.generator.slot_decoder import SlotDecoder
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
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "LlamaForCausalLM alone.*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "LlamaForCausalLM alone.*gpt2"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope type 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "kv heads"),
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie", [True, False])
def test_decoder_matches_transformers(kv_heads: int, tie: bool) -> None:
    """Ragged prompts, a temperature a slot, slots released and filled again in mid flight."""
    model = tiny_model(0, kv_heads=kv_heads, tie=tie)
    shape = read_config(config_json(model))
    decoder = SlotDecoder(shape, num_slots=6, max_len=32, seed=1)
    decoder.weights = build_weights(shape, named_tensors(model))
    random = torch.Generator().manual_seed(2)
    todo = [
        tuple(torch.randint(0, VOCABULARY, (length,), generator=random).tolist())
        for length in (1, 5, 9, 3, 3, 7, 2, 8, 4)
    ]
    # Equal prompts share one prefill.
    todo.insert(3, todo[2])
    live: dict[int, tuple[tuple[int, ...], float, list[int], list[float]]] = {}
    done, free = [], list(range(6))
    while todo or live:
        slots = [free.pop() for _ in range(min(len(free), len(todo)))]
        if slots:
            prompts, heat = [todo.pop(0) for _ in slots], [(1.0, 0.7, 1.5)[slot % 3] for slot in slots]
            decoder.prefill(slots, prompts, heat)
            live |= {slot: (prompt, at, [], []) for slot, prompt, at in zip(slots, prompts, heat, strict=True)}
        step = decoder.decode()
        for slot, token, logprob in zip(step.slots, step.tokens, step.logprobs, strict=True):
            live[slot][2].append(token)
            live[slot][3].append(logprob)
            if len(live[slot][2]) >= 4 + slot:
                done.append(live.pop(slot))
                decoder.release([slot])
                free.append(slot)
    assert len(done) == 10
    for prompt, heat_of, reply, logprobs in done:
        expected = reference_logprobs(model, prompt, reply, heat_of)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


def test_a_prompt_seen_before_is_copied_and_gives_the_same() -> None:
    model = tiny_model(0)
    shape = read_config(config_json(model))
    decoder = SlotDecoder(shape, num_slots=4, max_len=32, seed=1)
    decoder.weights = build_weights(shape, named_tensors(model))
    prompts = [(1, 2, 3, 4), (5, 6), (1, 2, 3, 9), (5, 6)]
    drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]

    def decode(count: int) -> None:
        for _ in range(count):
            step = decoder.decode()
            for slot, token, logprob in zip(step.slots, step.tokens, step.logprobs, strict=True):
                drawn[slot][0].append(token)
                drawn[slot][1].append(logprob)

    # Slot 2 copies from a running slot, slot 3 from one that has been released.
    decoder.prefill([0, 1], prompts[:2], [1.0, 1.0])
    decode(3)
    decoder.release([1])
    decoder.prefill([2, 3], prompts[2:], [1.0, 1.0])
    decode(4)
    for prompt, (tokens, logprobs) in zip(prompts, drawn, strict=True):
        expected = reference_logprobs(model, prompt, tokens)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


def test_new_weights_see_nothing_of_prompts_computed_by_old_ones() -> None:
    old, new = tiny_model(0), tiny_model(1)
    shape = read_config(config_json(old))
    decoder = SlotDecoder(shape, num_slots=2, max_len=32, seed=1)
    decoder.weights = build_weights(shape, named_tensors(old))
    decoder.prefill([0], [(1, 2, 3, 4)], [1.0])
    decoder.weights = build_weights(shape, named_tensors(new))
    decoder.prefill([1], [(1, 2, 3, 4)], [1.0])
    step = decoder.decode()
    expected = reference_logprobs(new, (1, 2, 3, 4), step.tokens[1:])
    torch.testing.assert_close(torch.tensor(step.logprobs[1:]), expected, atol=1e-4, rtol=0)


def test_equal_seeds_draw_equal_tokens() -> None:
    model = tiny_model(0)
    shape = read_config(config_json(model))
    drawn = []
    for seed in (1, 1, 2):
        decoder = SlotDecoder(shape, num_slots=4, max_len=32, seed=seed)
        decoder.weights = build_weights(shape, named_tensors(model))
        decoder.prefill([0, 1, 2, 3], [(1, 2)] * 4, [1.0] * 4)
        drawn.append([decoder.decode().tokens for _ in range(8)])
    assert drawn[0] == drawn[1] != drawn[2]


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
