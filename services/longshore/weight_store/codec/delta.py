"""The delta of one version's tensors from another's, lossless, for bfloat16, float16 and float32.

A tensor that did not change costs nothing. One of which few elements changed is coded by position and step
(`sparse.py`); one of which most did, in blocks (`blocks.py`), whichever is smaller. What can be read from the base,
as every element's exponent, is not sent. The base must be bit for bit the encoder's: the result's checksums tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from longshore.errors import IntegrityError
from longshore.weight_store.codec import blocks, choice, frame, kernels, sparse
from longshore.weight_store.codec.choice import BLOCKS, SAME, SPARSE, SPARSE_ROWS
from longshore.weight_store.codec.kernel import FORMATS, Bytes, Format, Kernel
from longshore.weight_store.codec.plan import Section, Sparse, rows_of, sections
from longshore.weight_store.payload import Tensor, TensorInfo

CODEC = "longshore-delta/1"

_MAGIC = b"LSD\x01"


def encode(base: Sequence[Tensor], new: Sequence[Tensor], threads: int = 1, *, kernel: Kernel | None = None) -> bytes:
    """The payload from which `new` is decoded where `base` is.

    Raises:
        ValueError: the two differ in order, names, dtypes or shapes, or bytes do not fit a shape.
    """
    layout = frame.layout_digest(new)
    if frame.layout_digest(base) != layout:
        raise ValueError("base and new tensors differ in order, names, dtypes or shapes: publish a full encoding")
    kernel = kernel or kernels.best()
    old_bytes, new_bytes = (dict(enumerate(map(frame.bytes_of, tensors))) for tensors in (base, new))

    def choose(index: int) -> choice.Choice:
        return choice.choose(kernel, index, new[index], old_bytes[index], new_bytes[index])

    choices, coded = _code_sparse(
        threads, kernel, new, old_bytes, new_bytes, frame.each(threads, choose, range(len(new)))
    )

    fields: list[npt.NDArray[np.generic]] = [np.array([own.mode for own in choices], np.uint8)]
    fields += [np.packbits(own.sparse.rows) for own in choices if own.sparse and own.sparse.rows is not None]
    parts: list[bytes | memoryview] = []
    for section in coded:
        fields += section.fields()
        parts += section.streams
    dense_tensors = [index for index, own in enumerate(choices) if own.mode == BLOCKS]
    for made in frame.each(
        threads,
        lambda index: blocks.encode(FORMATS[new[index].dtype].width, new_bytes[index], old_bytes[index]),
        dense_tensors,
    ):
        for block in made:
            fields += block.fields()
            parts += block.parts
    return frame.pack(_MAGIC, layout, fields, parts)


def decode(
    payload: bytes | memoryview,
    base: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    threads: int = 1,
    verify: bool = True,
    base_infos: Sequence[TensorInfo] | None = None,
    *,
    kernel: Kernel | None = None,
) -> list[Tensor]:
    """The tensors that `infos` describe: of those that did not change, base's own objects.

    With `verify` every tensor's BLAKE3 is compared with its info: of a changed tensor that of its decoded bytes; of an
    unchanged one that of `base_infos`, for a caller that has proven the base against them, else that of base's bytes.
    Whatever the payload is, it takes no more memory than `infos` tell and little besides, and ends.

    Raises:
        IntegrityError: naming the first thing that is wrong.
        ValueError: base has another layout than `infos`, or its bytes do not fit a shape.
    """
    if frame.layout_digest(base) != frame.layout_digest(infos):
        raise ValueError("base tensors and infos differ in order, names, dtypes or shapes")
    kernel = kernel or kernels.best()
    fields = frame.Fields(payload, _MAGIC, infos)
    modes = fields.take(len(infos))
    work = _plan(infos, [_sparse(fields, index, info, int(modes[index])) for index, info in enumerate(infos)])
    models = [sparse.read(fields, section) for _, section in work]
    dense = {
        index: blocks.read(fields, FORMATS[info.dtype].width, info.num_bytes)
        for index, info in enumerate(infos)
        if modes[index] == BLOCKS
    }
    fields.finish()

    changed = np.flatnonzero(modes != SAME).tolist()
    old = {index: frame.bytes_of(base[index]) for index in changed}
    made = {index: np.empty(infos[index].num_bytes, np.uint8) for index in changed}
    for index in changed:
        if modes[index] == SPARSE_ROWS:
            made[index][:] = old[index]

    def fill(number: int) -> None:
        (form, section), (model, streams) = work[number], models[number]
        if not kernel.decode(form, section, model, streams, old, made):
            first, last = infos[section.tensor[0]].name, infos[section.tensor[-1]].name
            raise IntegrityError(f"tensors {first} to {last}: the payload is damaged, or base is another version")

    frame.each(threads, fill, range(len(work)))
    frame.each(
        threads,
        lambda index: blocks.decode(
            infos[index].name, FORMATS[infos[index].dtype].width, dense[index], made[index], old[index]
        ),
        dense,
    )
    tensors = [frame.tensor_of(info, made[index]) if index in made else base[index] for index, info in enumerate(infos)]
    if verify:
        _verify(threads, tensors, infos, made, base_infos)
    return tensors


def _code_sparse(
    threads: int,
    kernel: Kernel,
    new: Sequence[Tensor],
    old_bytes: Mapping[int, Bytes],
    new_bytes: Mapping[int, Bytes],
    choices: Sequence[choice.Choice],
) -> tuple[Sequence[choice.Choice], list[sparse.Encoded]]:
    """The sections of what is sparse; tensors that were thought to be and are not are coded in blocks instead."""
    changes = {index: own.changes for index, own in enumerate(choices) if own.changes is not None}
    work = _plan(new, [own.sparse for own in choices])
    coded = frame.each(threads, lambda own: sparse.encode(kernel, own[0], own[1], old_bytes, new_bytes, changes), work)
    dense = {int(index) for own, made in zip(work, coded, strict=True) if made is None for index in own[1].tensor}
    if not dense:
        return choices, [made for made in coded if made is not None]
    choices = [choice.Choice(BLOCKS) if index in dense else own for index, own in enumerate(choices)]
    return _code_sparse(threads, kernel, new, old_bytes, new_bytes, choices)


def _verify(
    threads: int,
    tensors: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    changed: Mapping[int, Bytes],
    base_infos: Sequence[TensorInfo] | None,
) -> None:
    if base_infos is None:
        frame.verify(threads, tensors, infos)
        return
    for index, info in enumerate(infos):
        if index not in changed and base_infos[index].blake3 != info.blake3:
            raise IntegrityError(f"tensor {info.name} does not match its checksum: the payload leaves it unchanged")
    frame.verify(threads, [tensors[index] for index in changed], [infos[index] for index in changed])


def _sparse(fields: frame.Fields, index: int, info: TensorInfo, mode: int) -> Sparse | None:
    """What the payload says of one tensor's rows. Raises IntegrityError."""
    if mode in (SAME, BLOCKS):
        return None
    rows, width = rows_of(info.shape)
    if mode == SPARSE:
        return Sparse(index, rows * width, None)
    if mode == SPARSE_ROWS:
        packed = fields.take(-(-rows // 8)).astype(np.uint8)
        return Sparse(index, rows * width, np.unpackbits(packed, count=rows).view(np.bool_))
    raise IntegrityError(f"tensor {info.name}: the payload has mode {mode} for it, which this version does not know")


def _plan(
    tensors: Sequence[Tensor] | Sequence[TensorInfo], own: Sequence[Sparse | None]
) -> list[tuple[Format, Section]]:
    """The sections of all dtypes."""
    return [
        (form, section)
        for dtype, form in FORMATS.items()
        for section in sections([one for one in own if one is not None and tensors[one.tensor].dtype == dtype])
    ]
