"""The sparse delta of tensors of one dtype, section by section: scan, fit a model, write; read, fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longshore.errors import IntegrityError
from longshore.weight_store.codec import codes, frame
from longshore.weight_store.codec.codes import EXPONENTS, Model
from longshore.weight_store.codec.kernel import Bytes, Changes, Format, Kernel
from longshore.weight_store.codec.plan import Section


@dataclass(frozen=True)
class Encoded:
    """A section's fields and streams."""

    model: Model
    streams: Sequence[bytes]

    def fields(self) -> list[npt.NDArray[np.generic]]:
        gaps = np.diff(self.model.gap.reshape(-1), prepend=np.uint8(0))
        sizes = np.array([len(stream) for stream in self.streams], np.uint32)
        count = np.array([len(self.model.gap)], np.uint8)
        return [count, self.model.classes, gaps, self.model.step, sizes]


def encode(
    kernel: Kernel,
    form: Format,
    section: Section,
    old: Mapping[int, Bytes],
    new: Mapping[int, Bytes],
    changes: Mapping[int, Changes],
) -> Encoded | None:
    """None when the section's own bytes are no more than this would be."""
    scan = kernel.scan(form, section, old, new, changes)
    model = codes.fit(*(scan.tables[name].astype(np.int64) for name in ("elements", "changed", "excess")))
    size = section.elements * form.width
    streams = kernel.emit(scan, model, size + 64)
    if streams is None or sum(len(stream) for stream in streams) > size:
        return None
    return Encoded(model, streams)


def read(fields: frame.Fields, section: Section) -> tuple[Model, list[memoryview]]:
    """A section's model and streams. Raises IntegrityError."""
    count = int(fields.take(1)[0])
    if count > codes.MAX_CLASSES:
        raise IntegrityError(f"the payload has {count} classes in a section; at most {codes.MAX_CLASSES} are allowed")
    classes = fields.take(section.pieces).astype(np.uint8)
    if np.any((classes >= count) & (classes != codes.UNCHANGED)):
        raise IntegrityError("the payload names a class that its section does not have")
    gap = np.cumsum(fields.take(count * EXPONENTS)).astype(np.uint8).reshape(count, EXPONENTS)
    step = fields.take(count * EXPONENTS).astype(np.uint8).reshape(count, EXPONENTS)
    sizes = fields.take(2, np.uint32)
    return Model(classes, gap, step), [fields.part(int(size)) for size in sizes]
