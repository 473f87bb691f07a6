"""The full encoding of one version's tensors, lossless: blocks of byte planes, compressed where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longshore.weight_store.codec import blocks, frame
from longshore.weight_store.codec.kernel import FORMATS
from longshore.weight_store.payload import Tensor, TensorInfo, layout_digest

CODEC = "longshore-planes/1"

_MAGIC = b"LSP\x01"


def encode(tensors: Sequence[Tensor], threads: int = 1) -> bytes:
    """The payload from which the tensors are decoded. Raises ValueError: bytes do not fit a shape."""
    made = frame.each(
        threads,
        lambda tensor: blocks.encode(FORMATS[tensor.dtype].width, frame.bytes_of(tensor), None),
        tensors,
    )
    every = [block for own in made for block in own]
    fields = [field for block in every for field in block.fields()]
    return frame.pack(_MAGIC, layout_digest(tensors), fields, [part for block in every for part in block.parts])


def decode(
    payload: bytes | memoryview, infos: Sequence[TensorInfo], threads: int = 1, verify: bool = True
) -> list[Tensor]:
    """The tensors that `infos` describe, with `verify` each checked against its BLAKE3.

    Raises:
        IntegrityError: naming the first thing that is wrong.
    """
    fields = frame.Fields(payload, _MAGIC, infos)
    stored = [blocks.read(fields, FORMATS[info.dtype].width, info.num_bytes) for info in infos]
    fields.finish()
    made = [np.empty(info.num_bytes, np.uint8) for info in infos]

    def fill(index: int) -> None:
        info = infos[index]
        blocks.decode(info.name, FORMATS[info.dtype].width, stored[index], made[index], None)

    frame.each(threads, fill, range(len(infos)))
    tensors = [frame.tensor_of(info, data) for info, data in zip(infos, made, strict=True)]
    if verify:
        frame.verify(threads, tensors, infos)
    return tensors
