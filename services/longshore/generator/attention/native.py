"""kernel.c, built with the package by hatch_build.py. Its calls release the GIL."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import structlog

from longshore.c_library import LIBRARIES as LIBRARIES
from longshore.c_library import opened

FOLDER = Path(__file__).parent
# Dims of a head: whole vectors of the widest kernel, and what its sums have room for.
DIMS_MULTIPLE, MOST_DIMS = 16, 256

log = structlog.get_logger()


class Batch(ctypes.Structure):
    """As kernel.c's `batch` is laid out."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class Kernel:
    """One built library. `store` and `attend` take rows first..last-1 of a Batch."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when there is no such library, or it was built of other source."""
        self._library = opened(path, FOLDER)
        self.level = int(self._library.ls_level())
        self.store, self.attend = self._library.ls_store, self._library.ls_attend
        for function in (self.store, self.attend):
            function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
            function.restype = None


@functools.cache
def load() -> Kernel | None:
    """The kernel for this processor; None where none was built, or none that this processor runs."""
    try:
        plain = Kernel(FOLDER / LIBRARIES[0])
    except OSError as error:
        log.warning(
            "the torch engine runs without its C kernel and decodes several times slower; "
            "install a C compiler and then longshore again",
            reason=str(error),
        )
        return None
    for level in range(plain.level, 0, -1):
        try:
            return Kernel(FOLDER / LIBRARIES[level])
        except OSError:
            # The compiler did not know the flags.
            continue
    return plain
