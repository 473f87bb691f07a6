"""The safetensors file that a full encoding is: written, read and checked without torch or numpy.

The format is eight bytes of header length, a JSON header, then the tensors' bytes. Ours is the strict form: tensors
in the manifest's order, no gaps. Any safetensors reader reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import blake3

from longshore.errors import IntegrityError

CODEC = "safetensors"
MAX_HEADER_BYTES = 16 * 1024 * 1024

# Manifest name -> (safetensors name, bytes an element).
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
_BLOCK = 1024 * 1024


@dataclass(frozen=True)
class Tensor:
    """One tensor's bytes, little-endian, row-major.

    Example: Tensor("lm_head.weight", "bfloat16", (64, 128), data)  # len(data) == 64 * 128 * 2
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class TensorInfo:
    """What a manifest says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    # BLAKE3 of the tensor's bytes.
    blake3: bytes

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Raises ValueError for a dtype that no manifest may name."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    return math.prod(shape) * DTYPES[dtype][1]


def tensor_info(tensor: Tensor) -> TensorInfo:
    """Hashes a tensor. Raises ValueError when its bytes do not fit its shape."""
    expected = num_bytes(tensor.dtype, tensor.shape)
    if len(tensor.data) != expected:
        raise ValueError(f"tensor {tensor.name}: {len(tensor.data)} bytes, its shape and dtype need {expected}")
    return TensorInfo(tensor.name, tensor.dtype, tensor.shape, blake3.blake3(tensor.data).digest())


def layout_digest(tensors: Sequence[Tensor | TensorInfo]) -> bytes:
    """SHA-256 over order, names, dtypes and shapes, as compact JSON: equal where a delta is possible."""
    rows = [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).digest()


def max_payload_bytes(infos: Sequence[TensorInfo]) -> int:
    """The most bytes that any encoding of these tensors can have: a codec may add 2 % to what it cannot compress."""
    raw = sum(info.num_bytes for info in infos)
    return 8 + MAX_HEADER_BYTES + raw + raw // 50


def encode_header(tensors: Sequence[Tensor | TensorInfo]) -> bytes:
    """Everything before the tensors' bytes."""
    header: dict[str, object] = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + num_bytes(tensor.dtype, tensor.shape)
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded as the safetensors library does, so that the data starts on a multiple of eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def blocks(parts: Sequence[bytes], size: int = _BLOCK) -> Iterator[bytes]:
    """The parts' bytes in one sequence, as blocks of `size`; the last is shorter."""
    block = bytearray()
    for part in parts:
        view = memoryview(part)
        while view:
            taken = view[: size - len(block)]
            block += taken
            view = view[len(taken) :]
            if len(block) == size:
                yield bytes(block)
                block.clear()
    if block:
        yield bytes(block)


def check(file: IO[bytes], sha256: bytes, infos: Sequence[TensorInfo], *, keep: bool = False) -> tuple[Tensor, ...]:
    """Reads a payload from the file's start, once, and checks it and every tensor against their checksums.

    Returns:
        The tensors with `keep`; without, nothing, and memory for one block is needed.

    Raises:
        IntegrityError: naming the first thing that does not match.
    """
    file.seek(0)
    whole = hashlib.sha256()
    length = _taken(file, 8)
    header = _taken(file, _header_length(length))
    whole.update(length)
    whole.update(header)
    _check_header(header, infos)
    tensors = []
    for info in infos:
        own = blake3.blake3()
        kept = bytearray()
        left = info.num_bytes
        while left:
            block = _taken(file, min(left, _BLOCK))
            left -= len(block)
            own.update(block)
            whole.update(block)
            if keep:
                kept += block
        _compare(own.digest(), info)
        if keep:
            tensors.append(Tensor(info.name, info.dtype, info.shape, bytes(kept)))
    if file.read(1):
        raise IntegrityError("the payload goes on after its last tensor")
    if whole.digest() != sha256:
        raise IntegrityError("the payload does not match its SHA-256")
    return tuple(tensors)


def decode(
    payload: bytes | bytearray | memoryview, infos: Sequence[TensorInfo], verify: bool = True
) -> tuple[Tensor, ...]:
    """The tensors of a whole payload, with `verify` each checked against its checksum.

    Raises:
        IntegrityError: naming the first thing that does not match.
    """
    view = memoryview(payload)
    start = 8 + _header_length(bytes(view[:8]))
    _check_header(bytes(view[8:start]), infos)
    if len(view) != start + sum(info.num_bytes for info in infos):
        raise IntegrityError(f"the payload has {len(view)} bytes, which its tensors do not add up to")
    tensors = []
    for info in infos:
        data = bytes(view[start : start + info.num_bytes])
        start += info.num_bytes
        if verify:
            _compare(blake3.blake3(data).digest(), info)
        tensors.append(Tensor(info.name, info.dtype, info.shape, data))
    return tuple(tensors)


def _compare(digest: bytes, info: TensorInfo) -> None:
    if digest != info.blake3:
        raise IntegrityError(f"tensor {info.name} does not match its checksum in the manifest")


def _taken(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise IntegrityError("the payload is truncated")
    return data


def _header_length(prefix: bytes) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) != 8 or length > MAX_HEADER_BYTES:
        raise IntegrityError("the payload is not a safetensors file: its header has no sound length")
    return length


def _check_header(header: bytes, infos: Sequence[TensorInfo]) -> None:
    """The header must be the manifest's: same tensors, same order, no gaps."""
    try:
        entries = json.loads(header, object_pairs_hook=list)
        found = [
            (name, fields["dtype"], fields["shape"], fields["data_offsets"])
            for name, fields in ((name, dict(pairs)) for name, pairs in entries if name != "__metadata__")
        ]
        found.sort(key=lambda entry: entry[3])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise IntegrityError("the payload is not a safetensors file: its header cannot be read") from None
    expected = []
    end = 0
    for info in infos:
        start, end = end, end + info.num_bytes
        expected.append((info.name, DTYPES[info.dtype][0], list(info.shape), [start, end]))
    if found != expected:
        raise IntegrityError("the payload's header lists other tensors than the manifest")
