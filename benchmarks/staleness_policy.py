"""Many tiny Llamas in one computation: the forward pass of transformers' model for several sets of weights at a time.

A set is one row of numbers: every parameter of `new_policy` in its order, flattened. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, HEADS, EPSILON, THETA = 16, 4, 1e-6, 100.0


def new_policy(vocabulary: int, positions: int, seed: int) -> LlamaForCausalLM:
    """A Llama of one narrow layer, with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=positions,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float()


def flat(policy: torch.nn.Module) -> Tensor:
    """[D] all parameters."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in policy.parameters()])


class Policies:
    """The forward pass for S sets of weights, each with rows of its own."""

    def __init__(self, policy: LlamaForCausalLM) -> None:
        """The architecture of `policy`; its weights do not matter."""
        shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
        self._shapes = {name.removeprefix("model.layers.0."): shape for name, shape in shapes.items()}
        self._sizes = [shape.numel() for shape in shapes.values()]
        frequencies = THETA ** -(torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
        angles = torch.arange(policy.config.max_position_embeddings)[:, None] * frequencies
        # [positions, 1, D / 2]: the halves of a head turn together.
        self._cos, self._sin = angles.cos()[:, None], angles.sin()[:, None]

    def log_probs(self, weights_SD: Tensor, ids: Tensor, last: int = 1) -> Tensor:
        """[S, B, last, V] log-probs of what follows the last tokens of each of [S, B, L] rows."""
        sets, rows, length = ids.shape
        of = self._parts(weights_SD)
        vocabulary = self._shapes["model.embed_tokens.weight"][0]
        sets_S = torch.arange(sets)[:, None, None]
        # The only layer sees a token's embedding and its place alone: what it makes of them, it makes once for each
        # token of the vocabulary and each place.
        table = of["model.embed_tokens.weight"]
        joined = torch.cat([of[f"self_attn.{name}_proj.weight"] for name in "qkv"], 1)
        made = _normed(table, of["input_layernorm.weight"]) @ joined.mT
        query, key, value = made.view(sets, 1, vocabulary, 3 * HEADS, HIDDEN // HEADS).split(HEADS, 3)
        at_end, first = ids[:, :, length - last :], length - last
        seen = _attention(
            _gathered(
                self._turned(query, range(first, length)), (sets_S * last + torch.arange(last)) * vocabulary + at_end
            ),
            _gathered(self._turned(key, range(length)), (sets_S * length + torch.arange(length)) * vocabulary + ids),
            _gathered(value, sets_S * vocabulary + ids),
        )
        x = functional.embedding((sets_S * vocabulary + at_end).view(sets, rows * last), table.flatten(0, 1))
        x = x + seen.reshape(sets, rows * last, HIDDEN) @ of["self_attn.o_proj.weight"].mT
        x = x + _mlp(_normed(x, of["post_attention_layernorm.weight"]), of)
        logits = _normed(x, of["model.norm.weight"]) @ of["lm_head.weight"].mT
        return logits.log_softmax(-1).view(sets, rows, last, vocabulary)

    def _parts(self, weights_SD: Tensor) -> dict[str, Tensor]:
        parts = weights_SD.split(self._sizes, 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _turned(self, heads: Tensor, places: range) -> Tensor:
        """[S, L, V, H, D] rotary embeddings of [S, 1, V, H, D] for each of L places."""
        cos, sin = (table[places.start : places.stop, None] for table in (self._cos, self._sin))
        first, second = heads.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _gathered(table: Tensor, places: Tensor) -> Tensor:
    """[S * B, L, H, D] from [S, L, V, H, D] rows."""
    rows = functional.embedding(places.flatten(0, 1), table.reshape(-1, HIDDEN))
    return rows.unflatten(-1, (HEADS, HIDDEN // HEADS))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[N, Q, H, D] what the queries, which are those of the last places, see of the [N, L, H, D] keys and values."""
    length, last = key.shape[1], query.shape[1]
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) * (HIDDEN // HEADS) ** -0.5
    if last > 1:
        later = torch.arange(length) > torch.arange(length - last, length)[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), value)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """[S, N, E] by [S, E]."""
    return functional.rms_norm(x, (HIDDEN,), None, EPSILON) * weight[:, None]


def _mlp(x: Tensor, of: Mapping[str, Tensor]) -> Tensor:
    gate = functional.silu(x @ of["mlp.gate_proj.weight"].mT)
    return (gate * (x @ of["mlp.up_proj.weight"].mT)) @ of["mlp.down_proj.weight"].mT
