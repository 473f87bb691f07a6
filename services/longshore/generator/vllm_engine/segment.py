"""Tensors in shared memory, for processes on this machine that read them where they lie.

An anonymous file in memory: it has no name in any folder, is not bounded by the size of /dev/shm, and goes with the
last process that holds it. Sealed before anyone is told of it, so that a reader's checks stay true. The layout is that
of safetensors: the header's length in 8 bytes (little-endian), a header in JSON, the tensors' bytes. Nothing in it is
executed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from math import prod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from longshore.errors import IntegrityError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
# Header and tensors begin at multiples of this.
_ALIGN = 64
MAX_HEADER_BYTES = 64 * 1024 * 1024
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """Tensors that others may read by `path`, until it is closed."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies them. Raises IntegrityError for a dtype that no weights have; OSError when memory is short."""
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, tensor in tensors.items():
            if tensor.dtype not in _NAMES:
                raise IntegrityError(f"tensor {name}: dtype {tensor.dtype} is none of {', '.join(DTYPES)}")
            places[name] = (end, end + tensor.numel() * tensor.element_size())
            end = _aligned(places[name][1])
        entries = {
            name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places[name]}
            for name, tensor in tensors.items()
        }
        header = json.dumps(entries).encode()
        header += b" " * (_aligned(_LENGTH_BYTES + len(header)) - _LENGTH_BYTES - len(header))
        first = _LENGTH_BYTES + len(header)
        self.size = first + max(end, 1)
        self._fd = os.memfd_create("longshore-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self.size)
            with mmap.mmap(self._fd, self.size) as memory:
                memory[:first] = len(header).to_bytes(_LENGTH_BYTES, "little") + header
                for name, tensor in tensors.items():
                    start, end = places[name]
                    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                    memory[first + start : first + end] = memoryview(data)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def path(self) -> str:
        """Where processes of this user find it while it is open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Lets it go; who has it mapped may read on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self.close()


def read_segment(path: str, size: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a segment, over its own memory, which must not be written to.

    Raises:
        IntegrityError: the file is none of ours, or its header does not fit its size.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != size or size <= _LENGTH_BYTES:
            raise IntegrityError(f"{path} has {os.fstat(fd).st_size} bytes, not {size}")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise IntegrityError(f"{path} is not sealed")
        memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    length = int.from_bytes(memory[:_LENGTH_BYTES], "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise IntegrityError(f"a header of {length} bytes does not fit")
    first = _LENGTH_BYTES + length
    for name, entry in _header(memory[_LENGTH_BYTES:first]).items():
        yield name, _tensor(name, entry, memory, first)


def _header(data: bytes) -> dict[str, object]:
    try:
        header = json.loads(data)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise IntegrityError("the header is not a JSON object")
    return header


def _tensor(name: str, entry: object, memory: mmap.mmap, first: int) -> Tensor:
    try:
        dtype = DTYPES[entry["dtype"]]  # type: ignore[index]
        shape = tuple(int(length) for length in entry["shape"])  # type: ignore[index]
        start, end = (int(offset) for offset in entry["data_offsets"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(f"tensor {name}: its entry in the header is malformed") from None
    if (
        min((0, *shape)) < 0
        or not 0 <= start <= end <= len(memory) - first
        or end - start != prod(shape) * dtype.itemsize
    ):
        raise IntegrityError(f"tensor {name}: bytes {start}..{end} do not hold {shape} of {dtype}")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        # torch warns of memory that must not be written to: nobody does.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=first + start).reshape(shape)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
