"""The weights of a model as the torch engine wants them: float32, projections that share an input in one matrix.

Knows how published tensors are named and laid out; knows nothing of slots, caches or versions.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longshore.errors import IntegrityError
from longshore.generator.llama_config import LlamaShape

if TYPE_CHECKING:
    from longshore.weights.client import Tensor as PublishedTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"

_SERIALS = itertools.count(1)


@dataclass(frozen=True)
class Layer:
    """One block's weights."""

    input_norm: Tensor
    qkv: Tensor
    # None where the architecture has none.
    qkv_bias: Tensor | None
    # [heads + kv_heads, head_dim]: the norms of the query heads, then of the key heads.
    qk_norm: Tensor | None
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model, independent of the tensors that it was made from."""

    # No other weights of this process have it.
    serial: int
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Tensor
    # How the matrices were made, for the next version's sake.
    made: Made


class TorchViews:
    """Published tensors as torch tensors over the same memory, which is never written to.

    A published tensor that comes again, because a version did not change it, gives the same torch tensor again: so an
    engine can tell what changed.
    """

    def __init__(self) -> None:
        self._views: dict[str, tuple[PublishedTensor, Tensor]] = {}

    def of(self, received: Iterable[PublishedTensor]) -> dict[str, Tensor]:
        """The version's tensors by name.

        Raises:
            IntegrityError: a tensor's dtype is unknown, or its bytes do not fill its shape.
        """
        views = {}
        for item in received:
            known = self._views.get(item.name)
            views[item.name] = known if known is not None and known[0] is item else (item, _view(item))
        self._views = views
        return {name: view for name, (_, view) in views.items()}


def _view(item: PublishedTensor) -> Tensor:
    dtype = DTYPES.get(item.dtype)
    if dtype is None:
        raise IntegrityError(f"tensor {item.name}: dtype {item.dtype!r} is none of {', '.join(DTYPES)}")
    try:
        with warnings.catch_warnings():
            # torch warns of memory that must not be written to: nobody writes to published tensors.
            warnings.simplefilter("ignore", UserWarning)
            return torch.frombuffer(item.data, dtype=dtype).reshape(item.shape)
    except (RuntimeError, ValueError):
        raise IntegrityError(f"tensor {item.name}: {len(item.data)} bytes do not fill {item.shape}") from None


def build_weights(shape: LlamaShape, tensors: Mapping[str, Tensor], like: LlamaWeights | None = None) -> LlamaWeights:
    """Widens to float32 and stacks.

    Args:
        like: other weights, whose matrices are used again where `tensors` holds the very tensors they were made of.

    Raises:
        IntegrityError: tensors are missing, of another shape, or more than the model has.
    """
    _check(expected_shapes(shape), tensors)
    joined = _Joined(tensors, like.made if like else {})
    embedding = joined(EMBEDDING)
    layers = tuple(_layer(shape, joined, f"model.layers.{index}.") for index in range(shape.num_layers))
    head = embedding if shape.tie_embeddings else joined(HEAD)
    return LlamaWeights(next(_SERIALS), embedding, layers, joined(FINAL_NORM), head, joined.made)


def expected_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, hidden), FINAL_NORM: (hidden,)}
    for index in range(shape.num_layers):
        prefix = f"model.layers.{index}."
        expected |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_rows, hidden),
            prefix + "self_attn.k_proj.weight": (kv_rows, hidden),
            prefix + "self_attn.v_proj.weight": (kv_rows, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q_rows),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
        if shape.qkv_bias:
            rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
            expected |= {f"{prefix}self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
        if shape.qk_norm:
            expected |= {f"{prefix}self_attn.{name}_norm.weight": (shape.head_dim,) for name in "qk"}
    if not shape.tie_embeddings:
        expected[HEAD] = (shape.vocab_size, hidden)
    return expected


def _check(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    # With tied embeddings some checkpoints hold the head as well; it is the embedding again.
    extra = sorted(tensors.keys() - expected.keys() - {HEAD})
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {wanted}"
        for name, wanted in expected.items()
        if name in tensors and tuple(tensors[name].shape) != wanted
    ]
    for what, names in (("missing", missing), ("unknown", extra), ("wrong shape", wrong)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise IntegrityError(f"the tensors do not fit the model's config.json: {what}: {shown}")


def _layer(shape: LlamaShape, joined: _Joined, prefix: str) -> Layer:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return Layer(
        input_norm=joined(prefix + "input_layernorm.weight"),
        qkv=joined(*(f"{attention}{name}_proj.weight" for name in "qkv")),
        qkv_bias=joined(*(f"{attention}{name}_proj.bias" for name in "qkv")) if shape.qkv_bias else None,
        qk_norm=_norms(shape, joined, attention) if shape.qk_norm else None,
        out=joined(attention + "o_proj.weight"),
        post_norm=joined(prefix + "post_attention_layernorm.weight"),
        gate_up=joined(*(f"{mlp}{name}_proj.weight" for name in ("gate", "up"))),
        down=joined(mlp + "down_proj.weight"),
    )


def _norms(shape: LlamaShape, joined: _Joined, attention: str) -> Tensor:
    heads = {"q": shape.num_heads, "k": shape.num_kv_heads}
    return torch.cat([joined(f"{attention}{name}_norm.weight").expand(count, -1) for name, count in heads.items()])


# Matrices by the names of their parts, each with the tensors that it was made of.
Made = Mapping[tuple[str, ...], tuple[tuple[Tensor, ...], Tensor]]


class _Joined:
    """Makes matrices of a version's tensors, or takes those of another where nothing changed."""

    def __init__(self, tensors: Mapping[str, Tensor], earlier: Made) -> None:
        self.made: dict[tuple[str, ...], tuple[tuple[Tensor, ...], Tensor]] = {}
        self._tensors = tensors
        self._earlier = earlier

    def __call__(self, *names: str) -> Tensor:
        """The parts' rows in one float32 tensor of its own memory."""
        parts = tuple(self._tensors[name] for name in names)
        sources, joined = self._earlier.get(names, ((), None))
        if joined is None or len(sources) != len(parts) or any(a is not b for a, b in zip(sources, parts, strict=True)):
            joined = _stacked(parts)
        self.made[names] = (parts, joined)
        return joined


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    target = torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype=torch.float32)
    start = 0
    for part in parts:
        target[start : start + part.shape[0]].copy_(part.detach())
        start += part.shape[0]
    return target
