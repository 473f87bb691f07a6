"""Rotary position embeddings (Su et al. 2021, eq. 34) in the half-split layout of Llama, with the scalings of longer
contexts: `linear` (positions divided by a factor) and `llama3` (only slow rotations are: transformers'
`_compute_llama3_parameters`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longshore.generator.llama_config import LlamaShape


def rope_tables(shape: LlamaShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by position, each [length, head_dim / 2]."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    speeds = 1.0 / shape.rope_theta**exponent
    scaling = shape.rope_scaling
    if scaling is not None:
        if scaling.rope_type == "linear":
            speeds = speeds / scaling.factor
        else:
            turns = scaling.original_context * speeds / (2 * math.pi)
            # How much of a speed stays: nothing below `low` turns in the original context, all of it above `high`.
            kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
            speeds = (1 - kept) * speeds / scaling.factor + kept * speeds
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of dims, each one of the first half and one of the second; cos and sin have half of x's dims."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
