"""Pairs of versions for tests of the weight codec: any dtype, any bits, any pattern of edits."""

import numpy as np
from hypothesis import strategies as st

from longshore.weight_store.payload import Tensor

ITEM = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
# Bits of plus and minus zero, the smallest denormal, one, infinity, a NaN.
SPECIAL = {
    "bfloat16": [0, 0x8000, 1, 0x3F80, 0x7F80, 0x7FC1, 0xFFC0],
    "float16": [0, 0x8000, 1, 0x3C00, 0x7C00, 0x7E01, 0xFE00],
    "float32": [0, 0x80000000, 1, 0x3F800000, 0x7F800000, 0x7FC00001, 0xFFC00000],
}


def weights(rng, dtype, count, kind):
    """Bits of `count` elements: as trained weights are, any at all, or special ones."""
    if kind == "special":
        return rng.choice(np.array(SPECIAL[dtype], ITEM[dtype]), size=count)
    if kind == "any":
        return rng.integers(0, 2 ** (8 * ITEM[dtype]().itemsize), size=count, dtype=ITEM[dtype])
    values = rng.standard_normal(count, np.float32) * np.float32(0.02)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.view(np.uint32)


def edited(rng, dtype, bits, share, size):
    """`share` of the elements changed, by steps of up to `size` in their bits, or to anything at all (size 0)."""
    new = bits.copy()
    chosen = np.flatnonzero(rng.random(bits.size) < share)
    if size:
        steps = rng.integers(1, size + 1, size=len(chosen)) * rng.choice([-1, 1], size=len(chosen))
        new[chosen] += steps.astype(ITEM[dtype])
    else:
        new[chosen] = weights(rng, dtype, len(chosen), "any")
    return new


@st.composite
def versions(draw, most=40):
    """Base and new tensors of the same layout."""
    base, new = [], []
    for index in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(ITEM)))
        shape = tuple(draw(st.lists(st.integers(0, most), max_size=3)))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        bits = weights(rng, dtype, int(np.prod(shape)), draw(st.sampled_from(["trained", "any", "special"])))
        share, size = draw(st.sampled_from([0, 0.01, 0.1, 0.3, 1])), draw(st.sampled_from([1, 1, 3, 1000, 0]))
        base.append(Tensor(f"t{index}", dtype, shape, bits.tobytes()))
        new.append(Tensor(f"t{index}", dtype, shape, edited(rng, dtype, bits, share, size).tobytes()))
    return base, new
