"""Encoding all tensors' sparse sections, some tensors at a time.

A wave of tensors is looked at, the sections that it completes are coded, and what was found in their tensors is
forgotten: beside the payload, memory holds what changed in one wave and in the sections that are still open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from longshore.weight_store.codec import choice, frame, plan, sparse
from longshore.weight_store.codec.choice import BLOCKS, Choice
from longshore.weight_store.codec.kernel import FORMATS, Bytes, Kernel, Scan
from longshore.weight_store.codec.plan import Section, Sectioner
from longshore.weight_store.payload import Tensor


class _Encoder:
    """Codes tensors in the layout's order, wave by wave."""

    def __init__(
        self,
        threads: int,
        kernel: Kernel,
        tensors: Sequence[Tensor],
        old: Sequence[Bytes],
        new: Sequence[Bytes],
        dense: Collection[int],
    ) -> None:
        self._threads, self._kernel = threads, kernel
        self._tensors, self._old, self._new = tensors, old, new
        self._dense = dense
        self._sectioners = {dtype: Sectioner() for dtype in FORMATS}
        self._scans: dict[int, Scan] = {}
        # How each tensor is coded, without what was found in it.
        self.choices: list[Choice] = []
        # Sections by dtype.
        self.coded: dict[str, list[sparse.Encoded]] = {dtype: [] for dtype in FORMATS}
        # Tensors that were thought to be sparse, and are not.
        self.wrong: set[int] = set()

    def add(self, wave: range) -> None:
        """The next tensors."""
        work: list[tuple[str, Section]] = []
        for index, own in zip(wave, frame.each(self._threads, self._choose, wave), strict=True):
            self.choices.append(replace(own, scan=None))
            if own.cut is not None and own.scan is not None:
                self._scans[index] = own.scan
                dtype = self._tensors[index].dtype
                work += [(dtype, section) for section in self._sectioners[dtype].add(own.cut)]
        self._code(work)
        still_open = {part.cut.tensor for own in self._sectioners.values() for part in own.open}
        self._scans = {index: self._scans[index] for index in still_open}

    def finish(self) -> None:
        self._code([(dtype, section) for dtype, own in self._sectioners.items() for section in own.finish()])

    def _choose(self, index: int) -> Choice:
        if index in self._dense:
            return Choice(BLOCKS)
        return choice.choose(self._kernel, index, self._tensors[index], self._old[index], self._new[index])

    def _code(self, work: Sequence[tuple[str, Section]]) -> None:
        def code(own: tuple[str, Section]) -> sparse.Encoded | None:
            return sparse.encode(self._kernel, FORMATS[own[0]].width, own[1], self._scans)

        for (dtype, section), made in zip(work, frame.each(self._threads, code, work), strict=True):
            if made is None:
                self.wrong |= {part.cut.tensor for part in section}
            else:
                self.coded[dtype].append(made)


def encode(
    threads: int,
    kernel: Kernel,
    tensors: Sequence[Tensor],
    old: Sequence[Bytes],
    new: Sequence[Bytes],
    dense: Collection[int] = (),
) -> tuple[list[Choice], list[sparse.Encoded]]:
    """How each tensor is coded, and the sections, dtype by dtype. `dense`: tensors to be coded in blocks."""
    encoder = _Encoder(threads, kernel, tensors, old, new, dense)
    for wave in _waves(new, threads * plan.SECTION):
        encoder.add(wave)
    encoder.finish()
    if encoder.wrong:
        return encode(threads, kernel, tensors, old, new, encoder.wrong.union(dense))
    return encoder.choices, [made for own in encoder.coded.values() for made in own]


def _waves(tensors: Sequence[Bytes], size: int) -> Iterator[range]:
    """Consecutive tensors of `size` bytes in all, or a tensor more."""
    first, behind = 0, 0
    for index, tensor in enumerate(tensors):
        behind += len(tensor)
        if behind >= size or index + 1 == len(tensors):
            yield range(first, index + 1)
            first, behind = index + 1, 0
