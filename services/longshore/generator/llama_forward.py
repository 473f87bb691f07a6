"""The Llama computation in plain torch, block by block: shared by decoding, prefill and scoring.

For models of about a million parameters a step's cost is split between a few small matrix products and the overhead of
calling operators, so the operators per layer are few: fused projections, no Python loop over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from longshore.generator.llama_config import LlamaShape
from longshore.generator.llama_weights import Layer, LlamaWeights


def rope_tables(shape: LlamaShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each [length, head_dim]."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / shape.rope_theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout that Llama uses."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def norm(shape: LlamaShape, hidden: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(hidden, weight.shape, weight, shape.rms_norm_eps)


def project(shape: LlamaShape, layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as [..., heads, head_dim], before the rotation."""
    fused = functional.linear(norm(shape, hidden, layer.input_norm), layer.qkv)
    heads = fused.unflatten(-1, (-1, shape.head_dim))
    q, k, v = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=-2)
    return q, k, v


def finish_layer(shape: LlamaShape, layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Output projection and MLP, each with its residual; `mixed` is what attention gave."""
    hidden = hidden + functional.linear(mixed, layer.out)
    gate, up = functional.linear(norm(shape, hidden, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
    return hidden + functional.linear(functional.silu(gate) * up, layer.down)


def causal_qkv(
    shape: LlamaShape, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of whole sequences: [batch, heads, length, head_dim] each."""
    q, k, v = (part.transpose(1, 2) for part in project(shape, layer, hidden))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def causal_layer(shape: LlamaShape, layer: Layer, hidden: Tensor, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The rest of a layer over whole sequences: causal attention and MLP."""
    q, k, v = qkv
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return finish_layer(shape, layer, hidden, mixed.transpose(1, 2).flatten(2))


def score(shape: LlamaShape, weights: LlamaWeights, token_ids: Sequence[int]) -> list[float]:
    """[len - 1] log-probs at temperature 1 of each token after the first, given those before it; [] for one token."""
    if len(token_ids) < 2:
        return []
    with torch.inference_mode():
        ids = torch.tensor([list(token_ids)])
        context = ids[:, :-1]
        cos, sin = rope_tables(shape, context.shape[1])
        hidden = functional.embedding(context, weights.embedding)
        for layer in weights.layers:
            hidden = causal_layer(shape, layer, hidden, causal_qkv(shape, layer, hidden, cos, sin))
        logits = functional.linear(norm(shape, hidden[0], weights.final_norm), weights.head)
        picked = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
        return [float(value) for value in picked.squeeze(1)]
