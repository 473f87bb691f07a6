"""The computation of the Llama family in plain torch, block by block: over paged caches for decoding and prefill, and
over whole sequences, without any cache, for proving weights.

For models of about a million parameters a step's cost is split between a few small matrix products and the overhead of
calling operators, so the operators per layer are few: fused projections, no Python loop over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from longshore.generator.attention.cache import PagedCache, Rows
from longshore.generator.llama_config import LlamaShape
from longshore.generator.llama_weights import Layer, LlamaWeights
from longshore.generator.rope import rope_tables, rotate


def decode(cache: PagedCache, weights: LlamaWeights, tokens: Tensor, rows: Rows) -> Tensor:
    """[rows, vocabulary] logits of what follows each of the tokens; their keys and values are in the cache then."""
    shape = cache.shape
    hidden = functional.embedding(tokens, weights.embedding)
    for index, layer in enumerate(weights.layers):
        qkv = _project(shape, layer, hidden)
        cache.store(index, qkv, rows)
        hidden = _finish_layer(shape, layer, hidden, cache.attend(index, qkv, rows))
    return functional.linear(_norm(shape, hidden, weights.final_norm), weights.head)


def prefill(cache: PagedCache, weights: LlamaWeights, tokens: Tensor, rows: Rows) -> None:
    """Computes the keys and values of the tokens into the cache."""
    shape = cache.shape
    hidden = functional.embedding(tokens, weights.embedding)
    last = len(weights.layers) - 1
    for index, layer in enumerate(weights.layers):
        qkv = _project(shape, layer, hidden)
        cache.store(index, qkv, rows)
        # Of the last layer only the keys and values were needed.
        if index != last:
            hidden = _finish_layer(shape, layer, hidden, cache.attend(index, qkv, rows))


def score(shape: LlamaShape, weights: LlamaWeights, token_ids: Sequence[int]) -> list[float]:
    """[len - 1] log-probs of each token given those before it, at temperature 1."""
    if len(token_ids) < 2:
        return []
    with torch.inference_mode():
        ids = torch.tensor(list(token_ids))
        cos, sin = (table.unsqueeze(1) for table in rope_tables(shape, len(ids) - 1))
        hidden = functional.embedding(ids[:-1], weights.embedding)
        for layer in weights.layers:
            q, k, v = _project(shape, layer, hidden).split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), 1)
            q, k, v = (part.transpose(0, 1)[None] for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            grouped = shape.num_heads != shape.num_kv_heads
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            hidden = _finish_layer(shape, layer, hidden, mixed[0].transpose(0, 1).flatten(1))
        logits = functional.linear(_norm(shape, hidden, weights.final_norm), weights.head)
        return [float(value) for value in torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).squeeze(1)]


def _norm(shape: LlamaShape, hidden: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(hidden, weight.shape, weight, shape.rms_norm_eps)


def _project(shape: LlamaShape, layer: Layer, hidden: Tensor) -> Tensor:
    """[rows, heads + 2 * kv_heads, head_dim]: queries, keys and values, before the rotation."""
    fused = functional.linear(_norm(shape, hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
    heads = fused.unflatten(-1, (-1, shape.head_dim))
    if layer.qk_norm is not None:
        turned = heads[:, : layer.qk_norm.shape[0]]
        turned.copy_(functional.rms_norm(turned, (shape.head_dim,), None, shape.rms_norm_eps) * layer.qk_norm)
    return heads


def _finish_layer(shape: LlamaShape, layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Output projection and MLP, each with its residual; `mixed` is what attention gave, [rows, heads * head_dim]."""
    hidden = hidden + functional.linear(mixed, layer.out)
    gate, up = functional.linear(_norm(shape, hidden, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
    return hidden + functional.linear(functional.silu(gate) * up, layer.down)
