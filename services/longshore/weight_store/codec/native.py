"""kernel.c, built with the package by hatch_build.py, as a Kernel. Its calls release the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longshore.weight_store.codec.codes import EXPONENTS, UNCHANGED, Model
from longshore.weight_store.codec.kernel import EVENT, TABLE, Bytes, Changes, Format, Rows, Scan, words
from longshore.weight_store.codec.plan import Section

FOLDER = Path(__file__).parent
# What hatch_build.py builds, by instruction set: any, and where they are known x86-64-v3 and -v4.
LIBRARIES = {0: "_kernel.so", 3: "_kernel_v3.so", 4: "_kernel_v4.so"}

_SEGMENT = np.dtype(
    [("a", "<u8"), ("b", "<u8"), ("n", "<i8"), ("changed", "<u8"), ("first", "<i8"), ("piece", "<i4"), ("class", "<i4")]
)
# Rare exponents are counted one by one, which pays up to this share of all elements.
_RARE = 0.02


class _Emission(ctypes.Structure):
    _fields_ = (
        ("tables", ctypes.c_void_p),
        ("classes", ctypes.c_void_p),
        ("pieces", ctypes.c_int64),
        ("events", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("contexts", ctypes.c_int64),
        ("bits", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("bits_size", ctypes.c_int64),
        ("ranges_size", ctypes.c_int64),
    )


def load(folder: Path = FOLDER) -> NativeKernel:
    """The fastest library that runs here. Raises OSError when there is none."""
    level = int(ctypes.CDLL(str(folder / LIBRARIES[0])).ls_level())
    best = max(own for own, name in LIBRARIES.items() if own <= level and (folder / name).exists())
    return NativeKernel(folder / LIBRARIES[best])


class NativeKernel:
    """Raises OSError when the library is not there or cannot be loaded here."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        p, i64, i32, u32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
        for name, result, arguments in (
            ("ls_compare", i64, (p, p, i64, i32, u32, i32, p, p)),
            ("ls_scan", i64, (p, i64, p, i64, p, p, u32, i32, u32, i32)),
            ("ls_emit", i32, (p,)),
            ("ls_decode", i32, (p, i64, p, i64, p, p, i32, u32, i32)),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def compare(self, form: Format, old: Bytes, new: Bytes) -> Changes:
        count = len(old) // form.width
        bits = np.empty(-(-count // 64) + 1, np.uint64)
        bits[-1] = 0
        counts = np.zeros(EXPONENTS, np.int64)
        self._library.ls_compare(
            _address(old), _address(new), count, form.shift, form.mask, form.width, _address(bits), _address(counts)
        )
        return Changes(bits, counts)

    def scan(
        self,
        form: Format,
        section: Section,
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
        changes: Mapping[int, Changes],
    ) -> Scan:
        segments = _segments(form, section, old, new)
        tensors = np.unique(section.tensor).tolist()
        counts = sum(changes[tensor].counts for tensor in tensors)
        segments["changed"] = _column(section, {tensor: _address(changes[tensor].bits) for tensor in tensors})
        segments["first"] = section.start
        segments["piece"] = section.piece
        events = np.empty(int(np.sum(counts)), EVENT)
        tables = np.zeros(section.pieces, TABLE)
        used = np.asarray(counts != 0, np.uint8)
        found = self._library.ls_scan(
            _address(segments),
            len(segments),
            _address(tables),
            section.pieces,
            _address(events),
            _address(used),
            _rare_limit(form, section, old),
            form.shift,
            form.mask,
            form.width,
        )
        return Scan(events[:found], tables)

    def emit(self, scan: Scan, model: Model, room: int) -> list[bytes] | None:
        classes, codes = _classes(model), _codes(model)
        bits, ranges = np.empty(room, np.uint8), np.empty(room, np.uint8)
        emission = _Emission(
            _address(scan.tables),
            _address(classes),
            len(scan.tables),
            _address(scan.events),
            len(scan.events),
            _address(codes),
            codes.size // 2,
            _address(bits),
            _address(ranges),
            room,
            room,
        )
        if not self._library.ls_emit(ctypes.byref(emission)):
            return None
        # The range coder's first byte is always zero.
        return [bits[: emission.bits_size].tobytes(), ranges[1 : emission.ranges_size].tobytes()]

    def decode(
        self,
        form: Format,
        section: Section,
        model: Model,
        streams: Sequence[memoryview],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> bool:
        segments = _segments(form, section, old, new)
        segments["class"] = _classes(model)[section.piece]
        codes = _codes(model)
        views = [np.frombuffer(stream, np.uint8) for stream in streams]
        sizes = np.array([len(view) for view in views], np.int64)
        right = self._library.ls_decode(
            _address(segments),
            len(segments),
            _address(codes),
            len(model.gap),
            _address(np.array([_address(view) for view in views], np.uint64)),
            _address(sizes),
            form.shift,
            form.mask,
            form.width,
        )
        if right < 0:
            raise MemoryError("the codec's kernel got no memory for its readers")
        return bool(right)


def _address(array: npt.NDArray[np.generic]) -> int:
    return int(array.ctypes.data)


def _classes(model: Model) -> npt.NDArray[np.int32]:
    return np.where(model.classes == UNCHANGED, -1, model.classes.astype(np.int32)).astype(np.int32)


def _codes(model: Model) -> Bytes:
    """As kernel.c's `code` is laid out."""
    return np.stack([model.gap, model.step], axis=-1).reshape(-1)


def _column(section: Section, addresses: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """Of every segment, its tensor's address."""
    numbers = np.array(sorted(addresses), np.int64)
    column = np.array([addresses[number] for number in numbers.tolist()], np.int64)
    return column[np.searchsorted(numbers, section.tensor)]


def _segments(form: Format, section: Section, old: Mapping[int, Bytes], new: Mapping[int, Bytes]) -> Rows:
    segments = np.zeros(len(section.count), _SEGMENT)
    tensors = np.unique(section.tensor).tolist()
    for name, data in (("a", old), ("b", new)):
        addresses = {tensor: _address(data[tensor]) for tensor in tensors}
        segments[name] = _column(section, addresses) + section.start * form.width
    segments["n"] = section.count
    return segments


def _rare_limit(form: Format, section: Section, old: Mapping[int, Bytes]) -> int:
    """Up to which exponent values are rare, by a sample; it changes how fast the scan is, not what it finds."""
    some = np.linspace(0, len(section.count) - 1, min(len(section.count), 32)).astype(np.int64)
    runs = (
        words(form.width, old[int(section.tensor[own])])[int(section.start[own]) :][: min(int(section.count[own]), 64)]
        for own in some
    )
    exponents = (np.concatenate(list(runs)) >> form.shift) & form.mask
    shares = np.bincount(exponents, minlength=EXPONENTS) / len(exponents)
    shares[0] = 0
    return min(EXPONENTS - 1, int(np.searchsorted(np.cumsum(shares), _RARE)))
