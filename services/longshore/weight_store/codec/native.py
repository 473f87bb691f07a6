"""kernel.c, built with the package by hatch_build.py, as a Kernel. Its calls release the GIL."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longshore.c_library import LIBRARIES as LIBRARIES
from longshore.c_library import opened
from longshore.weight_store.codec import plan
from longshore.weight_store.codec.codes import EXPONENTS, UNCHANGED, Codes, Model
from longshore.weight_store.codec.kernel import EVENT, TABLE, Bits, Bytes, Floats, Format, Rows, Scan, Whole
from longshore.weight_store.codec.plan import Cut, Section, elements

FOLDER = Path(__file__).parent

_SEGMENT = np.dtype([("a", "<u8"), ("b", "<u8"), ("n", "<i8"), ("first", "<i8"), ("piece", "<i4"), ("class", "<i4")])
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
    """Raises OSError when the library is not there, cannot be loaded here, or was built of other source."""

    patience: int | None = None

    def __init__(self, library: Path) -> None:
        self._library = opened(library, FOLDER)
        self._local = threading.local()
        p, i64, i32, u32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
        for name, result, arguments in (
            ("ls_scan", i64, (p, p, i64, i64, p, p, p, i64, i64, p, i32, u32, i32)),
            ("ls_scan_segments", None, (p, i64, p, p, p, i32, u32, i32)),
            ("ls_sort", None, (p, p, p, i64, p, p, p)),
            ("ls_emit", i32, (p,)),
            ("ls_read", i32, (p,)),
            ("ls_start", None, (p, p, i64, p)),
            ("ls_fill", None, (p, p, i64, i32, u32, i32)),
            ("ls_add_product", None, (p, p, p, p, i64, i64, i64, i32, i32)),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def scan(self, form: Format, old: Bytes, new: Bytes, row: int, room: int) -> Whole | None:
        count = len(old) // form.width
        tables = np.zeros(-(-count // plan.PIECE), TABLE)
        changed = np.empty(-(-count // 64) + 1, np.uint64)
        changed[-1] = 0
        events = self._events(room)
        rows = np.zeros(count // row if row else 0, np.bool_)
        found = self._library.ls_scan(
            _address(old),
            _address(new),
            count,
            plan.PIECE,
            _address(changed),
            _address(tables),
            _address(events),
            room,
            max(1, row),
            _address(rows),
            form.shift,
            form.mask,
            form.width,
        )
        return None if found < 0 else Whole(Scan(events[:found].copy(), tables), changed, rows)

    def _events(self, room: int) -> Rows:
        """A thread's own memory, used again for each tensor: the system gives new memory slowly."""
        own: Rows | None = getattr(self._local, "events", None)
        if own is None or len(own) < room:
            own = self._local.events = np.empty(room, EVENT)
        return own

    def scan_rows(self, form: Format, cut: Cut, changed: Bits, old: Bytes, new: Bytes, count: int) -> Scan:
        segments = np.zeros(len(cut.start), _SEGMENT)
        segments["a"] = cut.start * form.width + _address(old)
        segments["b"] = cut.start * form.width + _address(new)
        segments["n"], segments["first"], segments["piece"] = cut.count, cut.start, cut.piece
        tables = np.zeros(len(cut.sizes), TABLE)
        events = np.empty(count, EVENT)
        self._library.ls_scan_segments(
            _address(segments),
            len(segments),
            _address(changed),
            _address(tables),
            _address(events),
            form.shift,
            form.mask,
            form.width,
        )
        return Scan(events, tables)

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

    def decoder(
        self,
        form: Format,
        section: Section,
        model: Model,
        streams: Sequence[memoryview],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> NativeDecoder | None:
        codes, counts = _codes(model), np.ascontiguousarray(model.counts)
        changes = np.empty(int(counts.sum()) + np.count_nonzero(counts), _CHANGE)
        bits, ranges = (np.frombuffer(stream, np.uint8) for stream in streams)
        reading = _Reading(
            _address(codes),
            _address(counts),
            counts.size,
            elements(section),
            _address(bits),
            _address(ranges),
            len(bits),
            len(ranges),
            _address(changes),
            1 << (8 * form.width - 1),
        )
        if not _answer(self._library.ls_read(ctypes.byref(reading))):
            return None
        contexts = np.empty(len(counts), _CONTEXTS)
        self._library.ls_start(_address(contexts), _address(counts), len(counts), _address(changes))
        return NativeDecoder(self._library, form, section, model, (contexts, changes), old, new)

    def add_product(self, form: Format, old: Bytes, down: Floats, up: Floats, new: Bytes) -> None:
        (rank, columns), rows = down.shape, len(up)
        arrays = (_address(old), _address(new), _address(down), _address(up))
        self._library.ls_add_product(*arrays, rows, columns, rank, form.shift, form.width)


class NativeDecoder:
    def __init__(
        self,
        library: ctypes.CDLL,
        form: Format,
        section: Section,
        model: Model,
        state: tuple[Rows, Rows],
        old: Mapping[int, Bytes],
        new: Mapping[int, Bytes],
    ) -> None:
        self._library = library
        self._form = form
        # The contexts point into the changes.
        self._state = state
        # All parts' segments: a few numpy calls for them all, and not for each.
        starts, counts, pieces = [], [], []
        first = 0
        for part in section:
            starts.append(part.cut.start[part.segments])
            counts.append(part.cut.count[part.segments])
            pieces.append(part.cut.piece[part.segments] + (first - part.pieces.start))
            first += part.pieces.stop - part.pieces.start
        lengths = [len(own) for own in starts]
        self._ends = np.append(0, np.cumsum(lengths)).tolist()
        self._segments = np.zeros(self._ends[-1], _SEGMENT)
        for name, tensors in (("a", old), ("b", new)):
            addresses = np.array([_address(tensors[part.cut.tensor]) for part in section], np.int64)
            self._segments[name] = np.repeat(addresses, lengths) + np.concatenate(starts) * form.width
        self._segments["n"] = np.concatenate(counts)
        self._segments["class"] = _classes(model.classes)[np.concatenate(pieces)]
        self._address = _address(self._segments)
        self._contexts = _address(state[0])

    def fill(self, number: int) -> None:
        first, last = self._ends[number : number + 2]
        self._library.ls_fill(
            self._contexts,
            self._address + first * _SEGMENT.itemsize,
            last - first,
            self._form.shift,
            self._form.mask,
            self._form.width,
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
