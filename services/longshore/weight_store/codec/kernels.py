"""Which kernel runs here."""

from __future__ import annotations

import functools

from longshore.weight_store.codec import native
from longshore.weight_store.codec.kernel import Kernel
from longshore.weight_store.codec.kernel_numpy import NumpyKernel


@functools.cache
def best() -> Kernel:
    """The C kernel; where it was not built or cannot be loaded, the numpy one, which is much slower."""
    try:
        return native.load()
    except OSError:
        return NumpyKernel()
