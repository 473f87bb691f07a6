"""Which kernel runs here."""

from __future__ import annotations

import functools

import structlog

from longshore.weight_store.codec import native
from longshore.weight_store.codec.kernel import Kernel
from longshore.weight_store.codec.kernel_numpy import NumpyKernel

# What the numpy kernel codes in a fraction of a second; it takes 40 us a change.
_PATIENCE = 2000

log = structlog.get_logger()


@functools.cache
def best() -> Kernel:
    """The C kernel; where it was not built or cannot be loaded, the numpy one.

    That one is a thousand times slower: it codes tensors with many changes in blocks, which are larger, and still takes
    long to decode what a C kernel has coded.
    """
    try:
        return native.load()
    except OSError as error:
        log.warning(
            "the weight codec runs without its C kernel: deltas are larger, and slow to decode; "
            "install a C compiler and then longshore again",
            reason=str(error),
        )
        return NumpyKernel(_PATIENCE)
