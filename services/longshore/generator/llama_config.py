"""Reads a Hugging Face `config.json` into what the torch engine needs, and refuses by name what it cannot decode."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pydantic
from pydantic import BaseModel, Field

from longshore.errors import ConfigError

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class _Family:
    """What a model's architecture says that its config.json does not, or leaves out where it is the default."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    # None: as many as there are query heads.
    kv_heads: int | None = None
    max_position_embeddings: int = 2048


# All one computation: RMS norms, rotary positions, grouped queries, a gated MLP.
FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family("mistral", kv_heads=8, max_position_embeddings=131072),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True, kv_heads=32, max_position_embeddings=32768),
    "Qwen3ForCausalLM": _Family("qwen3", qk_norm=True, head_dim=128, kv_heads=32, max_position_embeddings=32768),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary positions are stretched; see rope.py. `low`, `high` and `original_context` are llama3's."""

    rope_type: str
    factor: float
    low: float = 0.0
    high: float = 0.0
    original_context: int = 0


@dataclass(frozen=True)
class LlamaShape:
    """The part of a configuration that decides the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_embeddings: bool
    # Biases of the query, key and value projections.
    qkv_bias: bool = False
    # A norm of each query and key head before it is rotated.
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    @property
    def digest(self) -> str:
        """12 hex digits that differ for different shapes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class _LlamaConfig(BaseModel):
    """The keys of config.json that are read; defaults are those of transformers."""

    architectures: list[str] | None = None
    model_type: str = ""
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=2)
    hidden_act: str = "silu"
    rms_norm_eps: float = Field(1e-6, gt=0)
    max_position_embeddings: int | None = Field(None, ge=2)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # Qwen's sliding window is off by default, Mistral's on.
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    rope_theta: float = Field(10000.0, gt=0)
    # Older checkpoints keep the kind in `rope_scaling` and the base beside it.
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None

    @property
    def rope(self) -> dict[str, Any]:
        return self.rope_parameters or self.rope_scaling or {}


def read_config(content: bytes) -> LlamaShape:
    """Parses config.json.

    Raises:
        ConfigError: not a model that the torch engine decodes; names what it is and what is supported.
    """
    try:
        document = json.loads(content)
    except ValueError:
        raise ConfigError("the model's config.json is not JSON") from None
    name, family = _family(document)
    try:
        config = _LlamaConfig.model_validate(document)
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors(include_url=False)
        )
        raise ConfigError(f"the model's config.json: {faults}") from None
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or family.kv_heads or heads
    head_dim = config.head_dim or family.head_dim or config.hidden_size // heads
    scaling, fault = _scaling(config.rope)
    _check_variant(name, config, heads % kv_heads == 0, head_dim, fault)
    return LlamaShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope.get("rope_theta", config.rope_theta)),
        max_position_embeddings=config.max_position_embeddings or family.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_scaling=scaling,
    )


def _family(document: object) -> tuple[str, _Family]:
    if not isinstance(document, dict):
        raise ConfigError("the model's config.json must hold an object")
    names = document.get("architectures") or [document.get("model_type") or "unknown"]
    for name, family in FAMILIES.items():
        if names in ([name], [family.model_type]):
            return name, family
    shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
    raise ConfigError(
        f"the torch engine decodes {', '.join(FAMILIES)}; this model is {shown}: set generator.engine to vllm, which "
        "runs most architectures"
    )


def _scaling(rope: Mapping[str, Any]) -> tuple[RopeScaling | None, str]:
    """How positions are scaled, and what is wrong with it; "": nothing."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None, ""
    keys = {"linear": ("factor",), "llama3": ("factor", *_LLAMA3)}.get(rope_type)
    if keys is None:
        return None, f"rope type {rope_type!r} (supported: default, linear, llama3)"
    values = [rope.get(key) for key in keys]
    if not all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in values):
        return None, f"rope type {rope_type!r} without positive {', '.join(keys)}"
    numbers = [float(str(value)) for value in values]
    if rope_type == "linear":
        return RopeScaling("linear", numbers[0]), ""
    if numbers[1] >= numbers[2]:
        return None, f"low_freq_factor {numbers[1]} that is not below high_freq_factor {numbers[2]}"
    return RopeScaling("llama3", numbers[0], numbers[1], numbers[2], int(numbers[3])), ""


def _check_variant(name: str, config: _LlamaConfig, heads_fit: bool, head_dim: int, rope_fault: str) -> None:
    window = config.sliding_window is not None and config.use_sliding_window is not False
    kinds = set(config.layer_types or ()) - {"full_attention"}
    faults = [
        (bool(rope_fault), rope_fault),
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} (supported: silu)"),
        (config.attention_bias, "attention_bias (supported: none)"),
        (config.mlp_bias, "mlp_bias (supported: none)"),
        (window, f"sliding_window {config.sliding_window} (supported: none)"),
        (bool(kinds), f"layers of {', '.join(sorted(kinds))} (supported: full_attention)"),
        (not heads_fit, "heads that kv heads do not divide"),
        (head_dim < 2 or head_dim % 2 == 1, f"heads of {head_dim} dims (supported: even numbers)"),
    ]
    found = [text for wrong, text in faults if wrong]
    if found:
        raise ConfigError(
            f"the torch engine cannot decode this {name}: it has {', '.join(found)}; set generator.engine to vllm"
        )
