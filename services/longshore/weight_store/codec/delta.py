"""The delta of one version's tensors from another's, lossless, for bfloat16, float16 and float32.

A tensor that did not change costs nothing. One of which few elements changed is coded by position and step
(`sparse.py`); one of which most did, in blocks (`blocks.py`), whichever is smaller. What can be read from the base,
as every element's exponent, is not sent. The base must be bit for bit the encoder's: the result's checksums tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longshore.errors import IntegrityError
from longshore.weight_store.codec import blocks, frame, kernels, sparse, waves
from longshore.weight_store.codec.choice import BLOCKS, SAME, SPARSE, SPARSE_ROWS
from longshore.weight_store.codec.codes import Model
from longshore.weight_store.codec.kernel import FORMATS, Bytes, Format, Kernel
from longshore.weight_store.codec.plan import Cut, Section, Sectioner, cut, rows_of
from longshore.weight_store.payload import Tensor, TensorInfo, layout_digest

CODEC = "longshore-delta/1"

_MAGIC = b"LSD\x01"

Allocate = Callable[[int], Bytes]


def encode(base: Sequence[Tensor], new: Sequence[Tensor], threads: int = 1, *, kernel: Kernel | None = None) -> bytes:
    """The payload from which `new` is decoded where `base` is.

    Raises:
        ValueError: the two differ in order, names, dtypes or shapes, or bytes do not fit a shape.
    """
    layout = layout_digest(new)
    if layout_digest(base) != layout:
        raise ValueError("base and new tensors differ in order, names, dtypes or shapes: publish a full encoding")
    own = kernel or kernels.best()
    old_bytes, new_bytes = (list(map(frame.bytes_of, tensors)) for tensors in (base, new))
    choices, coded = waves.encode(threads, own, new, old_bytes, new_bytes)
    fields: list[npt.NDArray[np.generic]] = [np.array([one.mode for one in choices], np.uint8)]
    fields += [np.packbits(one.cut.rows) for one in choices if one.cut and one.cut.rows is not None]
    parts: list[bytes | memoryview] = []
    for section in coded:
        fields += section.fields()
        parts += section.streams

    def in_blocks(index: int) -> list[blocks.Block]:
        return blocks.encode(FORMATS[new[index].dtype].width, new_bytes[index], old_bytes[index])

    dense = [index for index, one in enumerate(choices) if one.mode == BLOCKS]
    for made in frame.each(threads, in_blocks, dense):
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
    allocate: Allocate | None = None,
    kernel: Kernel | None = None,
) -> list[Tensor]:
    """The tensors that `infos` describe: of those that did not change, base's own objects.

    With `verify` every tensor's BLAKE3 is compared with its info: of a changed tensor that of its decoded bytes; of an
    unchanged one that of `base_infos`, for a caller that has proven the base against them, else that of base's bytes.
    Whatever the payload is, it takes no more memory than `infos` tell and little besides, and ends.

    Args:
        allocate: gives the memory for a changed tensor of so many bytes, for callers that use theirs again; what it
            held is overwritten. Else it is new.

    Raises:
        IntegrityError: naming the first thing that is wrong.
        ValueError: base has another layout than `infos`, or its bytes do not fit a shape.
    """
    if layout_digest(base) != layout_digest(infos):
        raise ValueError("base tensors and infos differ in order, names, dtypes or shapes")
    own = kernel or kernels.best()
    contents = _read(payload, infos)
    changed = np.flatnonzero(contents.modes != SAME).tolist()
    targets = {
        index: _Target(infos[index], frame.bytes_of(base[index]), (allocate or _new)(infos[index].num_bytes))
        for index in changed
    }
    split = _split(contents.sections)
    checked = targets.keys() - split if verify else set()
    frame.each(threads, lambda coded: _fill_section(own, coded, targets, checked), contents.sections)
    frame.each(threads, lambda index: _fill_blocks(contents.blocks[index], targets[index], verify), contents.blocks)
    tensors = [
        frame.tensor_of(info, targets[index].new) if index in targets else base[index]
        for index, info in enumerate(infos)
    ]
    if verify:
        frame.verify(threads, [tensors[index] for index in split], [infos[index] for index in split])
        unchanged = [index for index in range(len(infos)) if index not in targets]
        frame.verify_unchanged(threads, unchanged, base, infos, base_infos)
    return tensors


@dataclass(frozen=True)
class _Coded:
    """A section as it was read."""

    form: Format
    section: Section
    model: Model
    streams: Sequence[memoryview]


@dataclass(frozen=True)
class _Contents:
    """A payload, read but not decoded; blocks by tensor."""

    modes: npt.NDArray[np.int64]
    sections: Sequence[_Coded]
    blocks: Mapping[int, Sequence[blocks.Stored]]


@dataclass(frozen=True)
class _Target:
    """A tensor to fill."""

    info: TensorInfo
    old: Bytes
    new: Bytes


def _read(payload: bytes | memoryview, infos: Sequence[TensorInfo]) -> _Contents:
    """Raises IntegrityError."""
    fields = frame.Fields(payload, _MAGIC, infos)
    modes = fields.take(len(infos))
    cuts = [_read_cut(fields, index, info, int(modes[index])) for index, info in enumerate(infos)]
    work = []
    for form, section in _plan(infos, cuts):
        model, streams = sparse.read(fields, section)
        work.append(_Coded(form, section, model, streams))
    stored = {
        index: blocks.read(fields, FORMATS[info.dtype].width, info.num_bytes)
        for index, info in enumerate(infos)
        if modes[index] == BLOCKS
    }
    fields.finish()
    # What is verified is what was filled: a tensor of which nothing is coded would be neither.
    coded = {part.cut.tensor for one in work for part in one.section} | stored.keys()
    for index in np.flatnonzero(modes != SAME).tolist():
        if index not in coded:
            raise IntegrityError(f"tensor {infos[index].name}: the payload says that it changed and has nothing of it")
    return _Contents(modes, work, stored)


def _read_cut(fields: frame.Fields, index: int, info: TensorInfo, mode: int) -> Cut | None:
    """How one tensor is cut; None where it is not sparse. Raises IntegrityError."""
    if mode in (SAME, BLOCKS):
        return None
    rows, width = rows_of(info.shape)
    if not info.num_bytes:
        raise IntegrityError(f"tensor {info.name}: the payload says that it changed and has nothing of it")
    if mode == SPARSE:
        return cut(index, rows * width, None)
    if mode == SPARSE_ROWS:
        packed = fields.take(-(-rows // 8)).astype(np.uint8)
        return cut(index, rows * width, np.unpackbits(packed, count=rows).view(np.bool_))
    raise IntegrityError(f"tensor {info.name}: the payload has mode {mode} for it, which this version does not know")


def _fill_section(kernel: Kernel, coded: _Coded, targets: Mapping[int, _Target], checked: Collection[int]) -> None:
    """Each tensor of those `checked` is verified once it is full, while the processor's cache still holds it."""
    old, new = ({index: getattr(own, name) for index, own in targets.items()} for name in ("old", "new"))
    decoder = kernel.decoder(coded.form, coded.section, coded.model, coded.streams, old, new)
    if decoder is None:
        names = " to ".join(targets[part.cut.tensor].info.name for part in (coded.section[0], coded.section[-1]))
        raise IntegrityError(f"tensors {names}: the payload's streams are damaged")
    for number, part in enumerate(coded.section):
        target = targets[part.cut.tensor]
        if part.cut.rows is not None and part.pieces.start == 0:
            target.new[:] = target.old
        decoder.fill(number)
        if part.cut.tensor in checked:
            frame.verify_bytes(target.new.data, target.info)


def _fill_blocks(stored: Sequence[blocks.Stored], target: _Target, verify: bool) -> None:
    blocks.decode(target.info.name, FORMATS[target.info.dtype].width, stored, target.new, target.old)
    if verify:
        frame.verify_bytes(target.new.data, target.info)


def _split(work: Sequence[_Coded]) -> list[int]:
    """Tensors that lie in more sections than one."""
    parts = [part for coded in work for part in coded.section]
    return [after.cut.tensor for before, after in itertools.pairwise(parts) if before.cut is after.cut]


def _new(size: int) -> Bytes:
    return np.empty(size, np.uint8)


def _plan(infos: Sequence[TensorInfo], cuts: Sequence[Cut | None]) -> list[tuple[Format, Section]]:
    """The sections of all dtypes."""
    planned = []
    for dtype, form in FORMATS.items():
        sectioner = Sectioner()
        own = (one for info, one in zip(infos, cuts, strict=True) if one is not None and info.dtype == dtype)
        planned += [(form, section) for one in own for section in sectioner.add(one)]
        planned += [(form, section) for section in sectioner.finish()]
    return planned
