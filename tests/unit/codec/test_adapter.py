"""Adapters: a sum that is the same to the bit everywhere, and payloads that are right or refused."""

import re

import numpy as np
import pytest
import torch
from adapted import SIDE, base_tensors, factor, merged, products

from longshore.errors import IntegrityError
from longshore.weight_store.codec import adapter, frame, planes
from longshore.weight_store.payload import Tensor, layout_digest, tensor_info
from longshore.weight_store.product import Product

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensor_of(values: torch.Tensor, name: str = "w") -> Tensor:
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    return Tensor(name, str(values.dtype).removeprefix("torch."), tuple(values.shape), raw)


def told(old: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """product.h's first lines, in torch: one rounded operation after the other."""
    total = torch.zeros(old.shape)
    for k in range(len(down)):
        total = total + up[:, k, None] * down[k]
    added = (old.float() + total).to(old.dtype)
    return torch.where(total == 0, old, added)


def shapes() -> list[tuple[int, int, int]]:
    """Rows, columns and rank, around what a kernel takes at a time."""
    return [(1, 1, 1), (2, 32, 2), (5, 33, 3), (3, 70, 8), (64, 31, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_what_is_told(kernel, dtype):
    generator = torch.Generator().manual_seed(5)
    for rows, columns, rank in shapes():
        old = torch.randn((rows, columns), generator=generator).to(DTYPES[dtype])
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        # Sums that are zero, or far below what they are added to, or far above it, or subnormal in float16.
        up[::2] *= 1e-6
        old[:, ::3] *= 1e-6
        down[:, ::4] *= 1e3
        up[0] = 0
        old[0, 0] = -0.0
        product = Product("w", tensor_of(down), tensor_of(up))
        (made,) = adapter.merge([tensor_of(old)], [product], kernel=kernel)
        assert bytes(made.data) == tensor_of(told(old, down, up)).data, (rows, columns, rank)


def test_a_thread_that_flushes_subnormal_numbers_gives_the_same_bits(native_kernels):
    down, up = tensor_of(torch.full((1, 40), 1e-25)), tensor_of(torch.full((3, 1), 1e-17))
    old = tensor_of(torch.zeros(3, 40))
    kernel = native_kernels[max(native_kernels)]
    usual = bytes(adapter.merge([old], [Product("w", down, up)], kernel=kernel)[0].data)
    assert any(usual)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        assert bytes(adapter.merge([old], [Product("w", down, up)], kernel=kernel)[0].data) == usual
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_is_no_number_is_one_and_the_same(kernel, dtype):
    old = torch.tensor([[1.0, float("inf"), -1.0, 2.0]]).to(DTYPES[dtype])
    down, up = tensor_of(torch.tensor([[3e38, float("-inf"), float("nan"), 0.0]])), tensor_of(torch.tensor([[2.0]]))
    (made,) = adapter.merge([tensor_of(old)], [Product("w", down, up)], kernel=kernel)
    found = torch.frombuffer(bytearray(made.data), dtype=DTYPES[dtype])
    nan = {"float32": "0000c07f", "bfloat16": "c07f", "float16": "007e"}[dtype]
    assert found[0] == float("inf")
    assert found[3] == 2.0
    assert [tensor_of(found[at : at + 1]).data.hex() for at in (1, 2)] == [nan, nan]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_payload_gives_the_sum_where_the_base_is(kernel, dtype, threads):
    base = base_tensors(dtype)
    expected = adapter.merge(base, products(1))
    payload = adapter.encode(base, products(1), threads)
    infos = [tensor_info(tensor) for tensor in expected]
    proven = [tensor_info(tensor) for tensor in base]
    for base_infos in (None, proven):
        decoded = adapter.decode(payload, base, infos, threads, base_infos=base_infos, kernel=kernel)
        assert [bytes(tensor.data) for tensor in decoded] == [bytes(tensor.data) for tensor in expected]
        assert decoded[0] is base[0], "what nothing is added to is base's own"
    assert len(payload) < sum(info.num_bytes for info in infos) / 8


def test_no_products_are_the_base_again():
    base = base_tensors()
    infos = [tensor_info(tensor) for tensor in base]
    assert adapter.decode(adapter.encode(base, []), base, infos) == base


def test_another_base_gives_something_else_and_is_refused():
    infos = [tensor_info(tensor) for tensor in merged(1)]
    payload = adapter.encode(base_tensors(), products(1))
    with pytest.raises(IntegrityError, match=r"q_proj\.weight does not match its checksum"):
        adapter.decode(payload, base_tensors(seed=1), infos)
    other = [tensor_info(tensor) for tensor in base_tensors(seed=1)]
    with pytest.raises(IntegrityError, match=r"embed\.weight does not match its checksum: the payload leaves it"):
        adapter.decode(payload, base_tensors(), [other[0], *infos[1:]], base_infos=infos)
    with pytest.raises(ValueError, match="differ in order"):
        adapter.decode(payload, base_tensors()[1:], infos)


def test_damaged_payloads_are_refused():
    base, infos = base_tensors(), [tensor_info(tensor) for tensor in merged(1)]
    payload = adapter.encode(base, products(1))
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(payload)
        damaged[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        with pytest.raises(IntegrityError):
            adapter.decode(bytes(damaged), base, infos)
    for length in (0, 3, 39, 41, len(payload) // 2, len(payload) - 1):
        with pytest.raises(IntegrityError):
            adapter.decode(payload[:length], base, infos)
    with pytest.raises(IntegrityError, match="goes on after"):
        adapter.decode(payload + b"\0", base, infos)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([4], "4 products for 3 tensors"),
        ([1, 9, 2], "rank 2 for tensor 9"),
        ([1, 1, 0], "rank 0 for tensor 1"),
        ([1, 1, SIDE + 1], f"rank {SIDE + 1} for tensor 1"),
        ([2, 1, 2, 1, 2], "two products for one tensor"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_before_anything_is_computed(numbers, reason):
    base, infos = base_tensors(), [tensor_info(tensor) for tensor in merged(1)]
    count = numbers[0]
    head = np.array((numbers + [1, 2] * count)[: 1 + 2 * count], np.uint32)
    inner = planes.encode([factor("down", (2, SIDE), np.random.default_rng(0))])
    size = np.array([len(inner)], np.uint64)
    with pytest.raises(IntegrityError, match=re.escape(reason)):
        adapter.decode(frame.pack(b"LSA\x01", layout_digest(base), [head, size], [inner]), base, infos)


def test_what_cannot_be_sent_is_said_and_refused():
    base, rng = base_tensors(), np.random.default_rng(0)
    wide = Product("q_proj.weight", factor("down", (SIDE + 1, SIDE), rng), factor("up", (SIDE, SIDE + 1), rng))
    nowhere = Product("q_proj.weight", factor("down", (2, SIDE), rng), tensor_of(torch.full((SIDE, 2), torch.inf)))
    for one in (wide, nowhere):
        assert not adapter.is_sendable(one)
        adapter.merge(base, [one])
        with pytest.raises(ValueError, match="publish a full encoding"):
            adapter.encode(base, [one])
    good = products(1)[0]
    assert adapter.is_sendable(good)
    for wrong in (
        [Product("k_proj.weight", good.down, good.up)],
        [Product("q_proj.weight", good.up, good.down)],
        [Product("q_proj.weight", good.down, factor("up", (SIDE, 3), rng))],
    ):
        with pytest.raises(ValueError, match="none that the product could be added to"):
            adapter.merge(base, wrong)
    with pytest.raises(ValueError, match="two products"):
        adapter.merge(base, [good, good])
