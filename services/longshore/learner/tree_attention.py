"""Attention over a token tree, for any Hugging Face decoder.

A place sees its own node up to itself, and the nodes above.

The seam is transformers' own: `attend` is registered as the attention function NAME, and a forward pass brings its
layout as the keyword `tree`. No mask over the pack is ever made. On a CPU each node attends to itself by PyTorch's
flash kernel, nodes of like length together; each inner node is attended to, unmasked, by all that grew from it at
once; the parts are put together by their log-sum-exp, as flash attention does with its blocks. On CUDA it is one call
of flex attention with a block mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longshore.errors import ConfigError
from longshore.learner.sending import sent
from longshore.learner.token_tree import Node, TokenTree

NAME = "longshore-tree"
# Nodes are padded to one length where that adds no more than this share of places, or this many.
MAX_PADDING, SMALL_PADDING = 0.125, 256
# Places of a tree on CUDA are a multiple of this: the side of a block of the mask.
BLOCK = 128

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Bucket:
    """B nodes of like length, of which the longest has L tokens."""

    # [B, L] the place of each token; a shorter node's last one is repeated.
    places: Tensor
    # [M] where the real tokens stand in `places` as one row; None: everywhere.
    real: Tensor | None


@dataclass(frozen=True)
class Parts:
    """A tree for the CPU: every node in one bucket, and the nodes that something grew from."""

    buckets: tuple[Bucket, ...]
    inner: tuple[Node, ...]
    # Sliding windows that layers asked for, noted as they were computed; no part of what is computed.
    windows: set[int] = field(default_factory=set)


def parts_of(tree: TokenTree) -> Parts:
    """What attention on a CPU is made of; the same for all layers."""
    nodes = sorted(tree.nodes, key=lambda node: -node.length)
    buckets: list[Bucket] = []
    start = 0
    while start < len(nodes):
        longest, real, end = nodes[start].length, nodes[start].length, start + 1
        while end < len(nodes):
            padding = (end + 1 - start) * longest - real - nodes[end].length
            if padding > max(SMALL_PADDING, MAX_PADDING * real):
                break
            real += nodes[end].length
            end += 1
        buckets.append(_bucket(nodes[start:end]))
        start = end
    inner = tuple(node for node in tree.nodes if node.end > node.stop)
    return Parts(tuple(buckets), inner)


def _bucket(nodes: Sequence[Node]) -> Bucket:
    lengths = torch.tensor([node.length for node in nodes])[:, None]
    columns = torch.arange(nodes[0].length)[None]
    places = torch.tensor([node.start for node in nodes])[:, None] + columns.minimum(lengths - 1)
    real = (columns < lengths).reshape(-1)
    return Bucket(places, None if bool(real.all()) else real.nonzero().squeeze(1))


def block_mask(tree: TokenTree, size: int, device: torch.device) -> BlockMask:
    """The tree, padded to `size` places, as flex attention takes it: the blocks of keys that a block of queries sees.

    Made from the nodes' ends alone, in (size / BLOCK)^2 comparisons; `size` is a multiple of BLOCK.
    """
    ends = torch.from_numpy(tree.subtree_ends(size))
    blocks = ends.reshape(-1, BLOCK)
    number = blocks.shape[0]
    row, column = torch.arange(number)[:, None], torch.arange(number)[None]
    # A key below the diagonal is seen by the queries before its subtree's end.
    below = column < row
    whole = below & (blocks.amin(1)[None] >= (row + 1) * BLOCK)
    part = (below & (blocks.amax(1)[None] > row * BLOCK) & ~whole) | (column == row)
    subtree_end = sent(ends.to(torch.int32), device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    part_number, part_index = _as_lists(part, device)
    whole_number, whole_index = _as_lists(whole, device)
    return BlockMask.from_kv_blocks(
        part_number,
        part_index,
        whole_number,
        whole_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(number * BLOCK, number * BLOCK),
    )


def _as_lists(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 1, R] how many blocks of each row are chosen, and [1, 1, R, C] which: those first."""
    number = chosen.sum(1, dtype=torch.int32)
    index = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return sent(number[None, None], device), sent(index[None, None].contiguous(), device)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Parts | BlockMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, T, D] queries, [1, K, T, D] keys and values to [1, T, H, D].

    A forward pass without a tree is plain causal attention.

    Raises:
        ConfigError: the layer attends in a way that a tree does not know.
    """
    if tree is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    _refuse_unknown(dropout, kwargs)
    if isinstance(tree, BlockMask):
        # A head of its own for each query head: the backward kernel works through the heads of a group one after
        # another, and with few key heads most of the chip would wait for it.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        out = flex(query, key, value, block_mask=tree, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    if kwargs.get("sliding_window") is not None:
        # No matter as long as no sequence outgrows it, which is for whoever makes packs to see to.
        tree.windows.add(kwargs["sliding_window"])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    return _TreeAttention.apply(*rows, tree, scale)[None], None


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _refuse_unknown(dropout: float, kwargs: dict[str, Any]) -> None:
    unknown = {"softcap": kwargs.get("softcap"), "s_aux": kwargs.get("s_aux"), "dropout": dropout or None}
    for name, given in unknown.items():
        if given is not None:
            raise ConfigError(f"the model's attention uses {name}, which training on packs does not know")


class _TreeAttention(torch.autograd.Function):  # type: ignore[misc]
    """[T, H, D] queries, [T, K, D] keys and values, H a multiple of K, to [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Parts, scale: float) -> Tensor:
        out = torch.empty_like(query)
        # [T, H] log-sum-exp of the scores of everything seen so far.
        total = query.new_empty(query.shape[:2], dtype=torch.float32)
        for bucket in tree.buckets:
            parts = (_gather(tensor, bucket) for tensor in (query, key, value))
            seen, log_sum = _flash(*parts, 0.0, True, scale=scale)
            _scatter(out, seen, bucket)
            _scatter(total, log_sum[..., None], bucket)
        for node in tree.inner:
            below, above = slice(node.stop, node.end), slice(node.start, node.stop)
            seen, log_sum = _flash(
                _heads(query[below]), _heads(key[above]), _heads(value[above]), 0.0, False, scale=scale
            )
            _join(out[below], total[below], seen[0].transpose(0, 1), log_sum[0].transpose(0, 1))
        ctx.save_for_backward(query, key, value, out, total)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        grad = grad.contiguous()
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        # Given the joined output and log-sum-exp, the kernel's backward is each part's share of the whole.
        for bucket in ctx.tree.buckets:
            parts = [_gather(tensor, bucket) for tensor in (grad, query, key, value, out)]
            if bucket.real is not None:
                parts[0] = parts[0] * _is_real(bucket).to(grad.dtype)
            shares = _flash_backward(
                *parts, _gather(total[..., None], bucket)[..., 0].contiguous(), 0.0, True, scale=ctx.scale
            )
            for tensor, share in zip(grads, shares, strict=True):
                _scatter(tensor, share, bucket)
        for node in ctx.tree.inner:
            below, above = slice(node.stop, node.end), slice(node.start, node.stop)
            shares = _flash_backward(
                _heads(grad[below]),
                _heads(query[below]),
                _heads(key[above]),
                _heads(value[above]),
                _heads(out[below]),
                total[below].t()[None].contiguous(),
                0.0,
                False,
                scale=ctx.scale,
            )
            for tensor, share, where in zip(grads, shares, (below, above, above), strict=True):
                tensor[where] += share[0].transpose(0, 1)
        return (*grads, None, None)


def _heads(rows: Tensor) -> Tensor:
    """[T, H, D] to [1, H, T, D], the same memory."""
    return rows.transpose(0, 1)[None]


def _gather(rows: Tensor, bucket: Bucket) -> Tensor:
    """[T, H, D] to [B, H, L, D]."""
    number, length = bucket.places.shape
    if number == 1:
        start = int(bucket.places[0, 0])
        return _heads(rows[start : start + length])
    return rows.index_select(0, bucket.places.reshape(-1)).view(number, length, *rows.shape[1:]).transpose(1, 2)


def _scatter(rows: Tensor, parts: Tensor, bucket: Bucket) -> None:
    """[B, H, L, D] back to where `_gather` took them from; a place is in one bucket only."""
    number, length = bucket.places.shape
    flat = parts.transpose(1, 2).reshape(number * length, *rows.shape[1:])
    if number == 1:
        start = int(bucket.places[0, 0])
        rows[start : start + length] = flat
    elif bucket.real is None:
        rows[bucket.places.reshape(-1)] = flat
    else:
        rows[bucket.places.reshape(-1)[bucket.real]] = flat[bucket.real]


def _is_real(bucket: Bucket) -> Tensor:
    """[B, 1, L, 1] 1 at real tokens, 0 at repeated ones."""
    assert bucket.real is not None
    flags = torch.zeros(bucket.places.numel())
    flags[bucket.real] = 1.0
    return flags.view(bucket.places.shape[0], 1, -1, 1)


def _join(out: Tensor, total: Tensor, seen: Tensor, log_sum: Tensor) -> None:
    """Adds what was seen elsewhere, in place: each side weighs as much as its share of the sum of exponentials."""
    joined = torch.logaddexp(total, log_sum)
    mixed = out * (total - joined).exp()[..., None] + seen * (log_sum - joined).exp()[..., None]
    out.copy_(mixed)
    total.copy_(joined)


AttentionInterface.register(NAME, attend)
