"""Whatever the tensors and whatever the change: what comes out is what went in, bit for bit."""

import blake3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.errors import IntegrityError
from longshore.weight_store.codec import delta, planes
from longshore.weight_store.payload import Tensor, tensor_info

ITEM = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


@st.composite
def versions(draw):
    """Base and new tensors: any bits, any pattern of edits."""
    base, new = [], []
    for index in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(ITEM)))
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        bits = rng.integers(0, 2 ** (8 * ITEM[dtype]().itemsize), size=int(np.prod(shape)), dtype=ITEM[dtype])
        edited = bits.copy()
        changed = rng.random(bits.size) < draw(st.sampled_from([0, 0.01, 0.3, 1]))
        edited[changed] += rng.integers(1, 4, size=int(changed.sum()), dtype=ITEM[dtype])
        base.append(Tensor(f"t{index}", dtype, shape, bits.tobytes()))
        new.append(Tensor(f"t{index}", dtype, shape, edited.tobytes()))
    return base, new


@settings(deadline=None)
@given(versions())
def test_a_delta_gives_back_the_new_tensors(pair):
    base, new = pair
    infos = [tensor_info(tensor) for tensor in new]
    decoded = delta.decode(delta.encode(base, new), base, infos)
    assert [bytes(tensor.data) for tensor in decoded] == [tensor.data for tensor in new]
    for old, own, got in zip(base, new, decoded, strict=True):
        assert (got is old) == (old.data == own.data)


@settings(deadline=None)
@given(versions())
def test_planes_give_back_the_tensors(pair):
    _, new = pair
    decoded = planes.decode(planes.encode(new), [tensor_info(tensor) for tensor in new])
    assert [bytes(tensor.data) for tensor in decoded] == [tensor.data for tensor in new]


def test_another_base_than_the_encoder_had_is_refused():
    rng = np.random.default_rng(1)
    base, other = (Tensor("w", "bfloat16", (64, 8), rng.bytes(1024)) for _ in range(2))
    new = Tensor("w", "bfloat16", (64, 8), bytes([base.data[0] ^ 1]) + base.data[1:])
    with pytest.raises(IntegrityError, match="tensor w"):
        delta.decode(delta.encode(base=[base], new=[new]), [other], [tensor_info(new)])
    same = delta.encode([base], [base])
    with pytest.raises(IntegrityError, match="tensor w"):
        delta.decode(same, [other], [tensor_info(base)])
    with pytest.raises(IntegrityError, match="tensor w"):
        delta.decode(same, [other], [tensor_info(base)], base_infos=[tensor_info(other)])


def test_other_layouts_are_refused():
    tensor = Tensor("w", "bfloat16", (2,), bytes(4))
    renamed = Tensor("v", "bfloat16", (2,), bytes(4))
    with pytest.raises(ValueError, match="differ"):
        delta.encode([tensor], [renamed])
    with pytest.raises(IntegrityError, match="layout"):
        delta.decode(delta.encode([tensor], [tensor]), [renamed], [tensor_info(renamed)])
    assert blake3.blake3(tensor.data).digest() == tensor_info(tensor).blake3
