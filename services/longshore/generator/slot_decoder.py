"""Batched token-by-token decoding of a Llama model on the CPU: slots, KV cache, sampling.

The decoder owns a fixed number of *slots*. Each holds one sequence's cache; every `decode` advances all active slots by
one sampled token. Slots are filled and released independently, and the weights may be replaced between two calls while
the caches stay as they are. Knows nothing of requests, versions or threads.

A slot's *pending* token is the last one whose keys and values are not in the cache yet: the last prompt token after a
prefill, the last sampled one after a decode. A decode feeds it, so even a slot's first token uses the weights of that
call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longshore.generator.llama_config import LlamaShape
from longshore.generator.llama_forward import (
    causal_layer,
    causal_qkv,
    finish_layer,
    norm,
    project,
    rope_tables,
    rotate,
)
from longshore.generator.llama_weights import LlamaWeights
from longshore.generator.prompt_index import PromptIndex

FLOAT_BYTES = 4
# Half the distance between two draws of a float in [0, 1): what a draw of exactly 0 stands for.
_SMALLEST_DRAW = 2.0**-25


def cache_bytes_per_token(shape: LlamaShape) -> int:
    """Bytes of keys and values that one token of one sequence takes."""
    return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * FLOAT_BYTES


@dataclass(frozen=True)
class DecodeStep:
    """What one decode drew, one entry for each active slot, in ascending slot order."""

    slots: list[int]
    tokens: list[int]
    # log_softmax(logits / temperature)[token].
    logprobs: list[float]


class SlotDecoder:
    """Decodes up to `num_slots` independent sequences together, in float32."""

    def __init__(self, shape: LlamaShape, num_slots: int, max_len: int, seed: int) -> None:
        assert max_len <= shape.max_position_embeddings
        self.shape = shape
        self.num_slots = num_slots
        self.max_len = max_len
        self._weights: LlamaWeights | None = None
        # Of the slots that other weights decode.
        self._own: dict[int, LlamaWeights] = {}
        self._random = torch.Generator().manual_seed(seed)
        # Keys and values live in one tensor a layer, so that a step writes both at once. Zeros, not empty: masked
        # positions must hold finite numbers, or 0 * nan would leak; the system gives the pages when they are used.
        cache = (num_slots, 2, shape.num_kv_heads, max_len, shape.head_dim)
        self._cache = [torch.zeros(cache) for _ in range(shape.num_layers)]
        self._lengths = torch.zeros(num_slots, dtype=torch.long)
        self._pending = torch.zeros(num_slots, dtype=torch.long)
        self._temperature = torch.ones(num_slots)
        self._active = torch.zeros(num_slots, dtype=torch.bool)
        self._slots = torch.empty(0, dtype=torch.long)
        self._prompts = PromptIndex()
        self._positions = torch.arange(max_len)
        self._cos, self._sin = rope_tables(shape, max_len)

    @property
    def weights(self) -> LlamaWeights | None:
        return self._weights

    @weights.setter
    def weights(self, weights: LlamaWeights) -> None:
        """An in-flight weight update: running sequences keep their caches, later prefills see none of them."""
        self._weights = weights
        self._prompts.clear()

    def stay(self, slots: Sequence[int]) -> None:
        """Lets the present weights go on decoding these slots when others take their place."""
        assert self._weights is not None
        for slot in slots:
            self._own.setdefault(slot, self._weights)

    @property
    def num_cached(self) -> int:
        """Tokens in the caches of active slots."""
        return int(self._lengths[self._slots].sum())

    def release(self, slots: Sequence[int]) -> None:
        """Takes slots out of the batch; their caches are overwritten by a later prefill."""
        self._active[list(slots)] = False
        self._slots = torch.nonzero(self._active).flatten()
        for slot in slots:
            self._own.pop(slot, None)

    def prefill(
        self,
        slots: Sequence[int],
        prompts: Sequence[tuple[int, ...]],
        temperatures: Sequence[float],
        weights: LlamaWeights | None = None,
    ) -> None:
        """Fills free, distinct slots with prompts and activates them.

        Args:
            weights: what decodes these slots; None: whatever the decoder's weights are, also when they change.

        Equal prompts are computed once, also when one of them came before and its slot has not been filled anew: the
        members of a group ask for the same prompt at about the same time. Prompt lengths must lie in 1..max_len - 1.
        """
        assert slots
        assert all(1 <= len(prompt) < self.max_len for prompt in prompts)
        contexts = [prompt[:-1] for prompt in prompts]
        with torch.inference_mode():
            if weights is None:
                self._fill(*self._prompts.plan(slots, contexts))
            else:
                self._fill_own(slots, contexts, weights)
        chosen = torch.tensor(slots)
        self._lengths[chosen] = torch.tensor([len(context) for context in contexts])
        self._pending[chosen] = torch.tensor([prompt[-1] for prompt in prompts])
        self._temperature[chosen] = torch.tensor(temperatures, dtype=torch.float32)
        self._active[chosen] = True
        self._slots = torch.nonzero(self._active).flatten()

    def _fill_own(self, slots: Sequence[int], contexts: list[tuple[int, ...]], weights: LlamaWeights) -> None:
        # Nobody may copy what other weights have computed.
        self._prompts.forget(slots)
        self._own.update(dict.fromkeys(slots, weights))
        computed = {slot: context for slot, context in zip(slots, contexts, strict=True) if context}
        if computed:
            self._compute(torch.tensor(list(computed)), list(computed.values()), weights)

    def _fill(self, computed: dict[int, tuple[int, ...]], copied: dict[int, int]) -> None:
        """Writes caches: of `computed` slots by a forward pass over their contexts, of `copied` ones from others."""
        if computed:
            assert self._weights is not None
            self._compute(torch.tensor(list(computed)), list(computed.values()), self._weights)
        if copied:
            targets, sources = torch.tensor(list(copied)), torch.tensor(list(copied.values()))
            width = max(len(self._prompts.context_of(slot)) for slot in copied)
            for cache in self._cache:
                cache[targets, :, :, :width] = cache[sources, :, :, :width]

    def _compute(self, slots: Tensor, contexts: list[tuple[int, ...]], weights: LlamaWeights) -> None:
        """Contexts are padded on the right: a causal mask hides the padding from every real position, and what it
        leaves in the cache lies beyond the slot's length."""
        width = max(map(len, contexts))
        tokens = torch.tensor([[*context, *([0] * (width - len(context)))] for context in contexts])
        cos, sin = self._cos[:width], self._sin[:width]
        hidden = functional.embedding(tokens, weights.embedding)
        last = len(self._cache) - 1
        for index, (layer, cache) in enumerate(zip(weights.layers, self._cache, strict=True)):
            qkv = causal_qkv(self.shape, layer, hidden, cos, sin)
            cache[slots, :, :, :width] = torch.stack(qkv[1:], dim=1)
            # Of the last layer only the keys and values were needed.
            if index != last:
                hidden = causal_layer(self.shape, layer, hidden, qkv)

    def decode(self) -> DecodeStep:
        """Draws one token for every active slot, of which there must be at least one.

        A slot that has been given max_len tokens must be released before.
        """
        with torch.inference_mode():
            slots, lengths = self._slots, self._lengths[self._slots]
            width = int(lengths.max()) + 1
            assert width <= self.max_len, "a slot is full"
            logits = self._logits(slots, lengths, width)
            tokens, logprobs = self._sample(logits, self._temperature[slots])
            self._lengths[slots] = lengths + 1
            self._pending[slots] = tokens
            return DecodeStep(slots.tolist(), tokens.tolist(), logprobs.tolist())

    def _logits(self, slots: Tensor, lengths: Tensor, width: int) -> Tensor:
        """[active, vocabulary], each row by the weights that decode its slot."""
        assert self._weights is not None
        if not self._own:
            return self._forward(self._weights, slots, lengths, width)
        rows: dict[int, list[int]] = {}
        owners: dict[int, LlamaWeights] = {}
        for row, slot in enumerate(slots.tolist()):
            weights = self._own.get(slot, self._weights)
            owners[id(weights)] = weights
            rows.setdefault(id(weights), []).append(row)
        logits = torch.empty(slots.numel(), self.shape.vocab_size)
        for owner, chosen in rows.items():
            part = torch.tensor(chosen)
            logits[part] = self._forward(owners[owner], slots[part], lengths[part], width)
        return logits

    def _forward(self, weights: LlamaWeights, slots: Tensor, lengths: Tensor, width: int) -> Tensor:
        """Feeds the pending tokens; returns the logits of the next ones, [len(slots), vocabulary]."""
        shape, count = self.shape, slots.numel()
        cos, sin = self._cos[lengths].unsqueeze(1), self._sin[lengths].unsqueeze(1)
        visible = self._positions[:width] <= lengths.unsqueeze(1)
        bias = torch.zeros(count, 1, 1, width).masked_fill_(~visible[:, None, None], -math.inf)
        # When every slot is active a view of the cache will do; otherwise its rows are gathered.
        whole = count == self.num_slots
        hidden = functional.embedding(self._pending[slots], weights.embedding)
        for layer, cache in zip(weights.layers, self._cache, strict=True):
            q, k, v = project(shape, layer, hidden)
            cache[slots, :, :, lengths] = torch.stack((rotate(k, cos, sin), v), dim=1)
            past = cache[:, :, :, :width] if whole else cache[:, :, :, :width][slots]
            # The query heads that share a key head stand as rows of one small attention problem.
            q = rotate(q, cos, sin).view(count, shape.num_kv_heads, -1, shape.head_dim)
            mixed = functional.scaled_dot_product_attention(q, past[:, 0], past[:, 1], attn_mask=bias)
            hidden = finish_layer(shape, layer, hidden, mixed.reshape(count, -1))
        return functional.linear(norm(shape, hidden, weights.final_norm), weights.head)

    def _sample(self, logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(logits / temperature.unsqueeze(1), dim=-1)
        # argmax(log p - log e) with e ~ Exp(1) is a draw from p: of racing clocks with rates p, the first to ring.
        clock = torch.empty_like(logprobs).exponential_(generator=self._random).clamp_min_(_SMALLEST_DRAW)
        tokens = (logprobs - clock.log_()).argmax(dim=-1)
        return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
