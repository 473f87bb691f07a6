"""Whatever the tensors and whatever the change: what comes out is what went in, bit for bit, by every kernel."""

import numpy as np
import pytest
from codec_versions import edited, versions, weights
from hypothesis import HealthCheck, given, settings

from longshore.errors import IntegrityError
from longshore.weight_store.codec import delta, planes
from longshore.weight_store.codec.kernel_numpy import NumpyKernel
from longshore.weight_store.payload import Tensor, tensor_info

anything = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def tensor(name, dtype, shape, bits):
    return Tensor(name, dtype, shape, bits.tobytes())


def decoded(payload, base, new, **options):
    return delta.decode(payload, base, [tensor_info(own) for own in new], **options)


@anything
@given(pair=versions())
def test_a_delta_gives_back_the_new_tensors(pair, kernel):
    base, new = pair
    got = decoded(delta.encode(base, new, kernel=kernel), base, new, kernel=kernel)
    assert [bytes(own.data) for own in got] == [own.data for own in new]
    for old, own, one in zip(base, new, got, strict=True):
        assert (one is old) == (old.data == own.data)


@anything
@given(pair=versions())
def test_all_kernels_give_the_same_bytes_and_read_each_others(pair, native_kernels):
    base, new = pair
    payload = delta.encode(base, new, kernel=NumpyKernel())
    for kernel in native_kernels.values():
        assert delta.encode(base, new, kernel=kernel) == payload
        got = decoded(payload, base, new, kernel=kernel)
        assert [bytes(own.data) for own in got] == [own.data for own in new]


@anything
@given(pair=versions())
def test_planes_give_back_the_tensors(pair):
    _, new = pair
    got = planes.decode(planes.encode(new), [tensor_info(own) for own in new])
    assert [bytes(own.data) for own in got] == [own.data for own in new]


def test_another_base_than_the_encoder_had_is_refused(kernel):
    rng = np.random.default_rng(1)
    bits = weights(rng, "bfloat16", 512, "trained")
    base, other = tensor("w", "bfloat16", (64, 8), bits), tensor("w", "bfloat16", (64, 8), bits[::-1])
    new = tensor("w", "bfloat16", (64, 8), edited(rng, "bfloat16", bits, 0.1, 1))
    with pytest.raises(IntegrityError, match=r"tensors? w"):
        decoded(delta.encode([base], [new], kernel=kernel), [other], [new], kernel=kernel)
    same = delta.encode([base], [base], kernel=kernel)
    with pytest.raises(IntegrityError, match="tensor w"):
        decoded(same, [other], [base], kernel=kernel)
    with pytest.raises(IntegrityError, match="tensor w"):
        decoded(same, [other], [base], base_infos=[tensor_info(other)], kernel=kernel)
    assert decoded(same, [base], [base], base_infos=[tensor_info(base)], kernel=kernel) == [base]


def test_other_layouts_are_refused():
    one = Tensor("w", "bfloat16", (2,), bytes(4))
    renamed = Tensor("v", "bfloat16", (2,), bytes(4))
    with pytest.raises(ValueError, match="differ"):
        delta.encode([one], [renamed])
    with pytest.raises(ValueError, match="differ"):
        decoded(delta.encode([one], [one]), [one], [renamed])
    with pytest.raises(IntegrityError, match="layout"):
        decoded(delta.encode([one], [one]), [renamed], [renamed])
    with pytest.raises(IntegrityError, match="layout"):
        planes.decode(planes.encode([one]), [tensor_info(renamed)])
