"""The part of a JobSpec that says what model is trained: `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longshore.config_base import Spec
from longshore.job_faults import Misfit, refuse


class NewModel(Spec):
    """A Llama decoder with random weights and its own small tokenizer."""

    kind: Literal["new"] = "new"
    hidden_size: int = Field(128, ge=16, le=4096)
    layers: int = Field(4, ge=1, le=64)
    heads: int = Field(4, ge=1, le=64)
    kv_heads: int = Field(4, ge=1, le=64)
    intermediate_size: int = Field(384, ge=16, le=16384)
    max_context: int = Field(64, ge=8, le=131072, description="tokens, prompt and replies together")
    tie_embeddings: bool = True
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary positions; small for short contexts")

    @model_validator(mode="after")
    def _heads_fit(self) -> NewModel:
        misfits = []
        if self.hidden_size % (2 * self.heads):
            message = f"must be a multiple of 2 * heads ({2 * self.heads})"
            misfits.append(Misfit("hidden_size", self.hidden_size, message, ("heads",)))
        if self.heads % self.kv_heads:
            message = f"must divide heads {self.heads}"
            misfits.append(Misfit("kv_heads", self.kv_heads, message, ("heads",)))
        refuse(misfits)
        return self


class DirectoryModel(Spec):
    """A Hugging Face checkpoint directory: config.json, safetensors, tokenizer.json."""

    kind: Literal["directory"]
    path: Path


class HubModel(Spec):
    """The same by its name at the Hugging Face hub: downloaded once, by the learner, into the hub's own cache."""

    kind: Literal["hub"]
    # Both become paths in the hub's cache: no part of them begins with a dot, as at the hub and in git.
    name: str = Field(pattern=r"^([\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}$", description="for example Qwen/Qwen3-0.6B")
    revision: str = Field(
        "main", max_length=128, pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$", description="branch, tag or commit"
    )


class GgufModel(Spec):
    """A GGUF file, de-quantised into an ordinary checkpoint once: needs longshore[gguf] where the learner runs."""

    kind: Literal["gguf"]
    path: Path


AnyModel = Annotated[NewModel | DirectoryModel | HubModel | GgufModel, Field(discriminator="kind")]
