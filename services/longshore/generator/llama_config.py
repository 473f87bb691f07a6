"""Reads a Hugging Face `config.json` into what the slot decoder needs, and refuses by name what it cannot decode."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import pydantic
from pydantic import BaseModel, Field

from longshore.errors import ConfigError

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class LlamaShape:
    """The part of a Llama configuration that decides the computation."""

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

    @property
    def digest(self) -> str:
        """12 hex digits that differ for different shapes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class _LlamaConfig(BaseModel):
    """The keys of config.json that are read; defaults are those of transformers' LlamaConfig."""

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
    max_position_embeddings: int = Field(2048, ge=2)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
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
        ConfigError: not a model that the torch-slots engine decodes; names what it is and what is supported.
    """
    try:
        document = json.loads(content)
    except ValueError:
        raise ConfigError("the model's config.json is not JSON") from None
    _check_architecture(document)
    try:
        config = _LlamaConfig.model_validate(document)
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors(include_url=False)
        )
        raise ConfigError(f"the model's config.json: {faults}") from None
    _check_variant(config)
    heads = config.num_attention_heads
    return LlamaShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or config.hidden_size // heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope.get("rope_theta", config.rope_theta)),
        max_position_embeddings=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
    )


def _check_architecture(document: object) -> None:
    if not isinstance(document, dict):
        raise ConfigError("the model's config.json must hold an object")
    names = document.get("architectures") or [document.get("model_type") or "unknown"]
    if names not in ([ARCHITECTURE], ["llama"]):
        shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        raise ConfigError(f"the torch-slots engine decodes {ARCHITECTURE} alone; this model is {shown}")


def _check_variant(config: _LlamaConfig) -> None:
    rope_type = config.rope.get("rope_type", config.rope.get("type", "default"))
    faults = [
        (rope_type != "default", f"rope type {rope_type!r} (supported: default)"),
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} (supported: silu)"),
        (config.attention_bias, "attention_bias (supported: none)"),
        (config.mlp_bias, "mlp_bias (supported: none)"),
        (config.num_attention_heads % (config.num_key_value_heads or 1) != 0, "heads that kv heads do not divide"),
    ]
    found = [text for wrong, text in faults if wrong]
    if found:
        raise ConfigError(f"the torch-slots engine cannot decode this {ARCHITECTURE}: it has {', '.join(found)}")
