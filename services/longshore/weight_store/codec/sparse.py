"""The sparse delta's sections: a model fitted and streams written; both read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longshore.errors import IntegrityError
from longshore.weight_store.codec import codes, frame
from longshore.weight_store.codec.codes import EXPONENTS, Model
from longshore.weight_store.codec.kernel import Kernel, Scan
from longshore.weight_store.codec.plan import Part, Section, elements


@dataclass(frozen=True)
class Encoded:
    """A section's fields and streams."""

    model: Model
    streams: Sequence[bytes]

    def fields(self) -> list[npt.NDArray[np.generic]]:
        used = self.model.gap != codes.UNUSED
        # Neighbours' divisors have a constant ratio, about.
        gaps = np.diff(self.model.gap.reshape(-1), prepend=np.uint8(0))
        # By planes of bytes, of which the higher ones are zeros.
        counts = self.model.counts[used].view(np.uint8).reshape(-1, 4).T.reshape(-1)
        sizes = np.array([len(stream) for stream in self.streams], np.uint32)
        count = np.array([len(self.model.gap)], np.uint8)
        return [count, self.model.classes, gaps, self.model.step[used], counts, sizes]


def encode(kernel: Kernel, width: int, section: Section, scans: Mapping[int, Scan]) -> Encoded | None:
    """`scans`: by tensor. None when the section's own bytes are no more than this would be."""
    own = [_part(part, scans[part.cut.tensor]) for part in section]
    counts = (np.concatenate([scan.tables[name] for scan in own]) for name in ("elements", "changed", "excess"))
    model = codes.fit(*counts)
    size = elements(section) * width
    streams = kernel.emit(own, model, size + 64)
    if streams is None or sum(len(stream) for stream in streams) > size:
        return None
    return Encoded(model, streams)


def read(fields: frame.Fields, section: Section) -> tuple[Model, list[memoryview]]:
    """A section's model and streams. Raises IntegrityError."""
    count = int(fields.take(1)[0])
    if count > codes.MAX_CLASSES:
        raise IntegrityError(f"the payload has {count} classes in a section; at most {codes.MAX_CLASSES} are allowed")
    classes = fields.take(sum(part.pieces.stop - part.pieces.start for part in section)).astype(np.uint8)
    if np.any((classes >= count) & (classes != codes.UNCHANGED)):
        raise IntegrityError("the payload names a class that its section does not have")
    gap = np.cumsum(fields.take(count * EXPONENTS)).astype(np.uint8).reshape(count, EXPONENTS)
    if np.any((gap > codes.MAX_GOLOMB) & (gap < codes.ADAPTIVE)):
        raise IntegrityError("the payload has a code for gaps that is not known")
    used = gap != codes.UNUSED
    number = int(np.count_nonzero(used))
    step = np.zeros((count, EXPONENTS), np.uint8)
    step[used] = fields.take(number)
    planes = fields.take(4 * number).reshape(4, number)
    counts = np.zeros((count, EXPONENTS), np.int64)
    counts[used] = (planes << np.arange(0, 32, 8)[:, None]).sum(axis=0)
    if np.any((counts == 0) & used) or counts.sum() > elements(section):
        raise IntegrityError(f"the payload has {counts.sum()} changes in {elements(section)} elements")
    sizes = fields.take(2, np.uint32)
    model = Model(classes, gap, step, counts.astype(np.uint32))
    return model, [fields.part(int(size)) for size in sizes]


def _part(part: Part, scan: Scan) -> Scan:
    """The part's own pieces of its tensor's scan."""
    if part.pieces.stop - part.pieces.start == len(scan.tables):
        return scan
    ends = np.append(0, np.cumsum(scan.tables["changed"].sum(axis=1).astype(np.int64)))
    return Scan(scan.events[ends[part.pieces.start] : ends[part.pieces.stop]], scan.tables[part.pieces])
