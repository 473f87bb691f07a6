"""C libraries of the package: a folder's kernel.c as hatch_build.py has built it, once for each level of processor."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

# What hatch_build.py builds, by level as a kernel.c's ls_level answers it.
LIBRARIES = {0: "_kernel.so", 1: "_kernel_avx2.so", 2: "_kernel_avx512.so"}


def source(folder: Path) -> int:
    """What a library built of this source answers; hatch_build.py computes the same."""
    files = sorted(folder.glob("*.[ch]"))
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:4], "big")


def opened(library: Path, folder: Path) -> ctypes.CDLL:
    """A library that was built of the source in `folder`.

    Raises:
        OSError: it is not there, cannot be loaded here, or was built of other source.
    """
    loaded = ctypes.CDLL(str(library))
    answer = getattr(loaded, "ls_source", None)
    if answer is None or answer() & 0xFFFFFFFF != source(folder):
        raise OSError(f"{library.name} was built of other source: run hatch_build.py")
    return loaded
