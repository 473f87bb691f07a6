"""kernel.c, built with the package by hatch_build.py, as a Kernel. Its calls release the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longshore.weight_store.codec.codes import EXPONENTS, UNCHANGED, Codes, Model
from longshore.weight_store.codec.kernel import EVENT, TABLE, Bytes, Changes, Format, Rows, Scan
from longshore.weight_store.codec.plan import Cut, Part

FOLDER = Path(__file__).parent
# What hatch_build.py builds, by level as kernel.c knows them.
LIBRARIES = {0: "_kernel.so", 1: "_kernel_avx2.so", 2: "_kernel_avx512.so"}

_SEGMENT = np.dtype(
    [("a", "<u8"), ("b", "<u8"), ("n", "<i8"), ("changed", "<u8"), ("first", "<i8"), ("piece", "<i4"), ("class", "<i4")]
)
_CHANGE = np.dtype([("gap", "<u4"), ("by", "<u4")])
_CONTEXTS = np.dtype([("until", "<i8", EXPONENTS), ("next", "<u8", EXPONENTS)])


class _Emission(ctypes.Structure):
    _fields_ = (
        ("events", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("contexts", ctypes.c_int64),
        ("bits", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("bits_size", ctypes.c_int64),
        ("ranges_size", ctypes.c_int64),
    )


class _Reading(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("contexts", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("bits", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("bits_size", ctypes.c_int64),
        ("ranges_size", ctypes.c_int64),
        ("changes", ctypes.c_void_p),
        ("top", ctypes.c_uint32),
    )


def load(folder: Path = FOLDER) -> NativeKernel:
    """The fastest library that runs here. Raises OSError when there is none."""
    level = int(ctypes.CDLL(str(folder / LIBRARIES[0])).ls_level())
    best = max(own for own, name in LIBRARIES.items() if own <= level and (folder / name).exists())
    return NativeKernel(folder / LIBRARIES[best])


class NativeKernel:
    """Raises OSError when the library is not there, cannot be loaded here, or was built of older source."""

    patience: int | None = None

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        p, i64, i32, u32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
        for name, result, arguments in (
            ("ls_compare", i64, (p, p, i64, i32, u32, i32, p, p, p)),
            ("ls_scan", i64, (p, i64, p, p, p, i32, u32, i32)),
            ("ls_sort", None, (p, p, p, i64, p, p, p)),
            ("ls_emit", i32, (p,)),
            ("ls_read", i32, (p,)),
            ("ls_start", None, (p, p, i64, p)),
            ("ls_fill", None, (p, p, i64, i32, u32, i32)),
        ):
            function = getattr(self._library, name, None)
            if function is None:
                raise OSError(f"{library.name} was built of older source")
            function.restype, function.argtypes = result, arguments

    def compare(self, form: Format, old: Bytes, new: Bytes) -> Changes:
        count = len(old) // form.width
        bits = np.empty(-(-count // 64) + 1, np.uint64)
        bits[-1] = 0
        values = np.empty(len(new), np.uint8)
        counts = np.zeros(EXPONENTS, np.int64)
        found = self._library.ls_compare(
            _address(old),
            _address(new),
            count,
            form.shift,
            form.mask,
            form.width,
            _address(bits),
            _address(values),
            _address(counts),
        )
        # A copy: most of the room was not used.
        return Changes(bits, values[: found * form.width].copy(), counts, found)

    def scan(self, form: Format, cut: Cut, changes: Changes, old: Bytes) -> Scan:
        segments = _segments(form, cut, slice(None), old)
        segments["changed"] = _address(changes.bits)
        segments["first"] = cut.start
        segments["piece"] = cut.piece
        events = np.empty(changes.total, EVENT)
        tables = np.zeros(len(cut.sizes), TABLE)
        found = self._library.ls_scan(
            _address(segments),
            len(segments),
            _address(changes.values),
            _address(tables),
            _address(events),
            form.shift,
            form.mask,
            form.width,
        )
        return Scan(events[:found], tables)

    def emit(self, scans: Sequence[Scan], model: Model, room: int) -> list[bytes] | None:
        codes, counts = _codes(model), np.ascontiguousarray(model.counts)
        events = np.empty(int(counts.sum()), EVENT)
        ends = np.cumsum(counts, dtype=np.int64) - counts.reshape(-1)
        rest = np.zeros(counts.size, np.uint32)
        first = 0
        for scan in scans:
            own = _classes(model.classes[first : first + len(scan.tables)])
            first += len(own)
            self._library.ls_sort(
                _address(scan.events),
                _address(scan.tables),
                _address(own),
                len(own),
                _address(events),
                _address(ends),
                _address(rest),
            )
        bits, ranges = np.empty(room, np.uint8), np.empty(room, np.uint8)
        emission = _Emission(
            _address(events),
            _address(codes),
            _address(counts),
            counts.size,
            _address(bits),
            _address(ranges),
            room,
            room,
        )
        if not _answer(self._library.ls_emit(ctypes.byref(emission))):
            return None
        # The range coder's first byte is always zero.
        return [bits[: emission.bits_size].tobytes(), ranges[1 : emission.ranges_size].tobytes()]

    def decoder(self, form: Format, model: Model, elements: int, streams: Sequence[memoryview]) -> NativeDecoder | None:
        codes, counts = _codes(model), np.ascontiguousarray(model.counts)
        changes = np.empty(int(counts.sum()) + np.count_nonzero(counts), _CHANGE)
        bits, ranges = (np.frombuffer(stream, np.uint8) for stream in streams)
        reading = _Reading(
            _address(codes),
            _address(counts),
            counts.size,
            elements,
            _address(bits),
            _address(ranges),
            len(bits),
            len(ranges),
            _address(changes),
            1 << (8 * form.width - 1),
        )
        right = _answer(self._library.ls_read(ctypes.byref(reading)))
        return NativeDecoder(self._library, counts, changes) if right else None


class NativeDecoder:
    def __init__(self, library: ctypes.CDLL, counts: npt.NDArray[np.uint32], changes: Rows) -> None:
        self._library = library
        # The contexts point into it.
        self._changes = changes
        self._contexts = np.empty(len(counts), _CONTEXTS)
        library.ls_start(_address(self._contexts), _address(counts), len(counts), _address(changes))

    def fill(self, form: Format, part: Part, classes: Codes, old: Bytes, new: Bytes) -> None:
        segments = _segments(form, part.cut, part.segments, old)
        segments["b"] = part.cut.start[part.segments] * form.width + _address(new)
        segments["class"] = _classes(classes)[part.cut.piece[part.segments] - part.pieces.start]
        self._library.ls_fill(
            _address(self._contexts), _address(segments), len(segments), form.shift, form.mask, form.width
        )


def _answer(result: int) -> bool:
    if result < 0:
        raise MemoryError("the codec's kernel got no memory")
    return bool(result)


def _address(array: npt.NDArray[np.generic]) -> int:
    # Much faster than `array.ctypes.data`, for bytes.
    return int(array.view(np.uint8).__array_interface__["data"][0])


def _classes(classes: Codes) -> npt.NDArray[np.int32]:
    """As kernel.c knows them: -1 where nothing changed."""
    return np.where(classes == UNCHANGED, np.int32(-1), classes.astype(np.int32))


def _codes(model: Model) -> Bytes:
    """As kernel.c's `code` is laid out."""
    return np.stack([model.gap, model.step], axis=-1).reshape(-1)


def _segments(form: Format, cut: Cut, own: slice, old: Bytes) -> Rows:
    segments = np.zeros(len(cut.start[own]), _SEGMENT)
    segments["a"] = cut.start[own] * form.width + _address(old)
    segments["n"] = cut.count[own]
    return segments
