"""What the leader tells the other ranks: a kind, JSON, and tensors, in two broadcasts. Nothing is pickled.

header   JSON: {"kind": ..., "told": {...}, "tensors": [[name, dtype, shape], ...]}
payload  the tensors' bytes behind each other, each beginning at a multiple of 8
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Json = dict[str, object]

_ALIGNED = 8
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int64, torch.float32, torch.bool)}


@dataclass(frozen=True)
class Message:
    """Example: Message("step", {"number": 3}, {"targets": tensor})"""

    kind: str
    told: Json = field(default_factory=dict)
    # On the CPU, of int64, float32 or bool.
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def encode(message: Message) -> tuple[Tensor, Tensor]:
    """The header and the payload, [H] and [P] uint8."""
    listed, parts = [], []
    for name, tensor in message.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert dtype in _DTYPES, f"{name} is of {dtype}"
        listed.append([name, dtype, list(tensor.shape)])
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        parts += [raw, raw.new_zeros(-raw.numel() % _ALIGNED)]
    text = json.dumps({"kind": message.kind, "told": message.told, "tensors": listed}).encode()
    header = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return header, torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def payload_bytes(header: Tensor) -> int:
    """How long the payload is that goes with a header."""
    end = 0
    for _, dtype, shape in _read(header)["tensors"]:
        end = _end(end, dtype, shape)
    return end


def decode(header: Tensor, payload: Tensor) -> Message:
    """The message; its tensors share the payload's memory."""
    read = _read(header)
    tensors, start = {}, 0
    for name, dtype, shape in read["tensors"]:
        size = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
        tensors[name] = payload[start : start + size].view(_DTYPES[dtype]).view(shape)
        start = _end(start, dtype, shape)
    return Message(read["kind"], read["told"], tensors)


def _end(start: int, dtype: str, shape: list[int]) -> int:
    size: int = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
    return start + size + -size % _ALIGNED


def _read(header: Tensor) -> dict:  # type: ignore[type-arg]
    read: dict = json.loads(header.numpy().tobytes())  # type: ignore[type-arg]
    return read
