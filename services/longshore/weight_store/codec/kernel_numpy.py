"""The Kernel without C: the same bytes. It scans arrays at once, but goes through changes one by one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from longshore.weight_store.codec.codes import EXPONENTS, UNCHANGED, UNUSED, Model
from longshore.weight_store.codec.kernel import EVENT, FLIP, TABLE, Bytes, Changes, Format, Rows, Scan, words
from longshore.weight_store.codec.plan import Flags, Ints, Section
from longshore.weight_store.codec.streams import StreamReader, StreamWriter


class NumpyKernel:
    def compare(self, form: Format, old: Bytes, new: Bytes) -> Changes:
        before = words(form.width, old)
        differs = before != words(form.width, new)
        bits = np.zeros(-(-len(before) // 64) + 1, np.uint64)
        packed = np.packbits(differs, bitorder="little")
        bits.view(np.uint8)[: len(packed)] = packed
        exponents = (before[differs] >> form.shift) & form.mask
        return Changes(bits, np.bincount(exponents, minlength=EXPONENTS).astype(np.int64))

    def scan(
        self,
        form: Format,
        section: Section,
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
        changes: Mapping[int, Changes],
    ) -> Scan:
        tables = np.zeros(section.pieces, TABLE)
        events = []
        for piece in range(section.pieces):
            before, after = (_elements(form, section, section.piece == piece, data) for data in (old, new))
            events.append(_scan_piece(form, before, after, tables[piece]))
        return Scan(np.concatenate(events), tables)

    def emit(self, scan: Scan, model: Model, room: int) -> list[bytes] | None:
        streams = _emit(scan.events, scan.tables, model)
        # The C kernel also needs room for the range coder's first byte, which is not sent.
        return streams if len(streams[0]) <= room and len(streams[1]) < room else None

    def decode(
        self,
        form: Format,
        section: Section,
        model: Model,
        streams: Sequence[memoryview],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> bool:
        every = slice(None)
        values = _elements(form, section, every, old)
        reader = StreamReader(bytes(streams[0]), bytes(streams[1]), len(values))
        values = _decode(form, reader, model, values, _contexts(form, section, values, model))
        at = 0
        for tensor, start, count in _runs(section, every):
            words(form.width, new[tensor])[start : start + count] = values[at : at + count]
            at += count
        return reader.done()


def _scan_piece(form: Format, before: Ints, after: Ints, table: np.void) -> Rows:
    exponents = (before >> form.shift) & form.mask
    changed = np.flatnonzero(before != after)
    # Each element's number among those of its context.
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
    gaps, steps, exponents = (events[name].tolist() for name in ("gap", "step", "exponent"))
    rest = np.zeros(model.gap.shape, np.int64)
    # Class and events of each piece.
    parts = []
    end = len(events)
    # From gaps within pieces to the gap that follows each event in the section.
    for piece in reversed(range(len(tables))):
        label = int(model.classes[piece])
        if label == UNCHANGED:
            continue
        own = (rest[label] + tables["tail"][piece]).tolist()
        start = end - int(tables["changed"][piece].sum())
        for index in range(end - 1, start - 1, -1):
            exponent = exponents[index] % EXPONENTS
            gaps[index], own[exponent] = own[exponent], gaps[index]
        rest[label] = own
        parts.append((label, range(start, end)))
        end = start
    writer = StreamWriter()
    codes, step_codes = model.gap.tolist(), model.step.tolist()
    for label, row in enumerate(codes):
        for exponent in np.flatnonzero(row).tolist():
            writer.gap(row[exponent], int(rest[label, exponent]))
    for label, indices in reversed(parts):
        for index in indices:
            exponent = exponents[index] % EXPONENTS
            writer.step(step_codes[label][exponent], steps[index], exponents[index] >= FLIP)
            writer.gap(codes[label][exponent], gaps[index])
    return writer.finish()


def _decode(form: Format, reader: StreamReader, model: Model, values: Ints, contexts: Ints) -> Ints:
    """The section's new values. `contexts` is -1 where nothing changed."""
    gap, step = model.gap.reshape(-1).tolist(), model.step.reshape(-1).tolist()
    order = np.argsort(contexts, kind="stable")
    starts = np.searchsorted(contexts[order], np.arange(len(gap) + 1))
    top = 1 << (8 * form.width - 1)
    # The next change of each context: its place in the section, the context, its number among the context's elements.
    due: list[tuple[int, int, int]] = []

    def follow(context: int, number: int) -> None:
        number += reader.gap(gap[context])
        if number < starts[context + 1] - starts[context]:
            heapq.heappush(due, (int(order[starts[context] + number]), context, number))

    for context, code in enumerate(gap):
        if code != UNUSED:
            follow(context, 0)
    values = values.copy()
    while due:
        place, context, number = heapq.heappop(due)
        old = int(values[place])
        flip, down, size = reader.step(step[context])
        low = (old + (-size if down else size)) & (top - 1)
        values[place] = ((old & top) ^ (top if flip else 0)) | low
        follow(context, number + 1)
    return values


def _runs(section: Section, own: Flags | slice) -> Iterator[tuple[int, int, int]]:
    columns = (section.tensor, section.start, section.count)
    yield from zip(*(column[own].tolist() for column in columns), strict=True)


def _elements(form: Format, section: Section, own: Flags | slice, data: Mapping[int, Bytes]) -> Ints:
    parts = [words(form.width, data[tensor])[start : start + count] for tensor, start, count in _runs(section, own)]
    return np.concatenate(parts).astype(np.int64)


def _contexts(form: Format, section: Section, values: Ints, model: Model) -> Ints:
    classes = np.repeat(model.classes[section.piece].astype(np.int64), section.count)
    return np.where(classes == UNCHANGED, -1, classes * EXPONENTS + ((values >> form.shift) & form.mask))
