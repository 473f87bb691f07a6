"""The Kernel without C: the same bytes. It scans arrays at once, but goes through changes one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from longshore.weight_store.codec.codes import EXPONENTS, UNCHANGED, Model
from longshore.weight_store.codec.kernel import (
    EVENT,
    FLIP,
    FORMATS,
    TABLE,
    Bits,
    Bytes,
    Floats,
    Format,
    Rows,
    Scan,
    Whole,
    Words,
    words,
)
from longshore.weight_store.codec.plan import Cut, Flags, Ints, Section, cut, elements
from longshore.weight_store.codec.streams import FLIPPED, StreamReader, StreamWriter

# Elements of which a product's sums are made at a time.
_CACHED = 1 << 16
_NAN = {FORMATS["float32"]: 0x7FC00000, FORMATS["bfloat16"]: 0x7FC0, FORMATS["float16"]: 0x7E00}


class NumpyKernel:
    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience

    def scan(self, form: Format, old: Bytes, new: Bytes, row: int, room: int) -> Whole | None:
        differs = words(form.width, old) != words(form.width, new)
        if np.count_nonzero(differs) > room:
            return None
        changed = np.zeros(-(-len(differs) // 64) + 1, np.uint64)
        packed = np.packbits(differs, bitorder="little")
        changed.view(np.uint8)[: len(packed)] = packed
        rows = differs.reshape(len(differs) // row if row else 0, row).any(axis=1)
        return Whole(self._scan(form, cut(0, len(differs), None), old, new), changed, rows)

    def scan_rows(self, form: Format, cut: Cut, changed: Bits, old: Bytes, new: Bytes, count: int) -> Scan:
        return self._scan(form, cut, old, new)

    def _scan(self, form: Format, cut: Cut, old: Bytes, new: Bytes) -> Scan:
        tables = np.zeros(len(cut.sizes), TABLE)
        events = [np.zeros(0, EVENT)]
        for piece, table in enumerate(tables):
            own = cut.piece == piece
            before, after = (_elements(form, cut, own, data) for data in (old, new))
            events.append(_scan_piece(form, before, after, table))
        return Scan(np.concatenate(events), tables)

    def emit(self, scans: Sequence[Scan], model: Model, room: int) -> list[bytes] | None:
        events, tables = ([getattr(scan, name) for scan in scans] for name in ("events", "tables"))
        streams = _emit(np.concatenate(events), np.concatenate(tables), model)
        # The C kernel also needs room for the range coder's first byte, which is not sent.
        return streams if len(streams[0]) <= room and len(streams[1]) < room else None

    def decoder(
        self,
        form: Format,
        section: Section,
        model: Model,
        streams: Sequence[memoryview],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> NumpyDecoder | None:
        reader = StreamReader(bytes(streams[0]), bytes(streams[1]), elements(section))
        changes = {}
        for label, exponent in np.argwhere(model.counts).tolist():
            gap, step = int(model.gap[label, exponent]), int(model.step[label, exponent])
            rows = [(reader.gap(gap), reader.step(step)) for _ in range(int(model.counts[label, exponent]))]
            # Each change's number among the section's elements of the context.
            numbers = np.cumsum([own + 1 for own, _ in rows]) - 1
            changes[label, exponent] = numbers, np.array([by for _, by in rows], np.int64)
        return NumpyDecoder(form, section, model, changes, old, new) if reader.done() else None

    def add_product(self, form: Format, old: Bytes, down: Floats, up: Floats, new: Bytes) -> None:
        rows, columns = len(up), down.shape[1]
        before, after = (words(form.width, data).reshape(rows, columns) for data in (old, new))
        # As many rows at a time as a processor's cache holds.
        height = max(1, _CACHED // max(1, columns))
        with np.errstate(all="ignore"):
            for part in (slice(first, first + height) for first in range(0, rows, height)):
                sums = np.zeros_like(before[part], np.float32)
                for number, row in enumerate(down):
                    sums += up[part, number, None] * row
                rounded = _rounded(form, _widened(form, before[part]) + sums)
                after[part] = np.where(sums == 0, before[part], rounded)


class NumpyDecoder:
    def __init__(
        self,
        form: Format,
        section: Section,
        model: Model,
        changes: Mapping[tuple[int, int], tuple[Ints, Ints]],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> None:
        self._form = form
        self._section = section
        self._labels = iter(model.classes.tolist())
        self._changes = changes
        self._old, self._new = old, new
        # By context: its elements that are behind.
        self._seen = dict.fromkeys(changes, 0)

    def fill(self, number: int) -> None:
        part = self._section[number]
        tensor = part.cut.tensor
        for piece in range(part.pieces.start, part.pieces.stop):
            own = part.cut.piece == piece
            values = _elements(self._form, part.cut, own, self._old[tensor])
            self._change(self._form, next(self._labels), values)
            at = 0
            for start, count in _runs(part.cut, own):
                words(self._form.width, self._new[tensor])[start : start + count] = values[at : at + count]
                at += count

    def _change(self, form: Format, label: int, values: Ints) -> None:
        """Changes a piece's values."""
        exponents = (values >> form.shift) & form.mask
        top = 1 << (8 * form.width - 1)
        for context, (numbers, steps) in self._changes.items():
            if context[0] != label:
                continue
            own = np.flatnonzero(exponents == context[1])
            seen = self._seen[context]
            self._seen[context] += len(own)
            due = slice(*np.searchsorted(numbers, [seen, seen + len(own)]))
            places = own[numbers[due] - seen]
            # The sign of -1 is that of a change of sign: see StreamReader.step.
            flips = steps[due] >= FLIPPED // 2
            by = np.where(flips, steps[due] - FLIPPED, steps[due])
            before = values[places]
            values[places] = ((before & top) ^ (flips * top)) | ((before + by) & (top - 1))


def _widened(form: Format, values: Words) -> Floats:
    if form.width == 4:
        return values.view(np.float32)
    if form == FORMATS["float16"]:
        return values.view(np.float16).astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _rounded(form: Format, values: Floats) -> Words:
    """To the nearest, of two the even one; every NaN is the same one."""
    bits = values.view(np.uint32)
    if form == FORMATS["float16"]:
        bits = values.astype(np.float16).view(np.uint16)
    elif form.width == 2:
        bits = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), bits.dtype.type(_NAN[form]), bits)


def _scan_piece(form: Format, before: Ints, after: Ints, table: np.void) -> Rows:
    exponents = (before >> form.shift) & form.mask
    changed = np.flatnonzero(before != after)
    # Each element's number among those of its exponent.
    order = np.argsort(exponents, kind="stable")
    sizes = np.bincount(exponents, minlength=EXPONENTS)
    rank = np.empty(len(before), np.int64)
    rank[order] = np.arange(len(before)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    low = (1 << (8 * form.width - 1)) - 1
    events = np.zeros(len(changed), EVENT)
    context = exponents[changed]
    by_context = np.argsort(context, kind="stable")
    first = np.diff(context[by_context], prepend=-1) != 0
    ranks = rank[changed][by_context]
    gaps = np.empty(len(changed), np.int64)
    gaps[by_context] = ranks - np.where(first, 0, np.concatenate([[0], ranks[:-1]]) + 1)
    step = (after[changed] & low) - (before[changed] & low)
    flips = (before[changed] ^ after[changed]) > low
    events["gap"], events["step"], events["exponent"] = gaps, step, context + FLIP * flips
    np.add.at(table["changed"], context, 1)
    np.add.at(table["excess"], context, (np.abs(step) + 2 * flips - 1).astype(np.uint64))
    table["elements"][:] = sizes
    np.subtract.at(sizes, context, gaps + 1)
    table["tail"][:] = sizes
    return events


def _emit(events: Rows, tables: Rows, model: Model) -> list[bytes]:
    exponents = (events["exponent"] % EXPONENTS).astype(np.int64)
    pieces = np.repeat(np.arange(len(tables)), tables["changed"].sum(axis=1).astype(np.int64))
    contexts = model.classes[pieces] * np.int64(EXPONENTS) + exponents
    order = np.argsort(contexts, kind="stable")
    # To an exponent's first gap in a piece comes what followed its last change in those before, of the same class.
    gaps = events["gap"].astype(np.int64)
    rest = np.zeros(model.gap.shape, np.int64)
    at = 0
    for piece, table in enumerate(tables):
        label, end = int(model.classes[piece]), at + int(table["changed"].sum())
        if label == UNCHANGED:
            continue
        own, first = np.unique(exponents[at:end], return_index=True)
        gaps[at:end][first] += rest[label, own]
        rest[label, own] = 0
        rest[label] += table["tail"]
        at = end
    writer = StreamWriter()
    codes, steps = model.gap.reshape(-1)[contexts], model.step.reshape(-1)[contexts]
    columns = (codes, gaps, steps, events["step"], events["exponent"] >= FLIP)
    for code, gap, step_code, step, flip in zip(*(column[order].tolist() for column in columns), strict=True):
        writer.gap(code, gap)
        writer.step(step_code, step, flip)
    return writer.finish()


def _runs(cut: Cut, own: Flags) -> Iterator[tuple[int, int]]:
    yield from zip(cut.start[own].tolist(), cut.count[own].tolist(), strict=True)


def _elements(form: Format, cut: Cut, own: Flags, data: Bytes) -> Ints:
    parts = [words(form.width, data)[start : start + count] for start, count in _runs(cut, own)]
    return np.concatenate(parts).astype(np.int64)
