from __future__ import annotations

import random
import time

from longshore.weight_store.copies import Copies, HostCopy
from longshore.weight_store.payload import Tensor, tensor_info


def copy(*seeds: int, size: int = 100) -> HostCopy:
    """Tensors t0, t1, ... whose bytes depend on the seeds alone; equal seeds give equal bytes, not the same object."""
    tensors = tuple(
        Tensor(f"t{index}", "float32", (size // 4,), random.Random(seed).randbytes(size))
        for index, seed in enumerate(seeds)
    )
    return HostCopy(tuple(tensor_info(tensor) for tensor in tensors), tensors)


def test_the_least_recently_used_go_first() -> None:
    copies: Copies[int] = Copies(limit=2, max_bytes=10_000)
    copies.put(1, copy(1))
    copies.put(2, copy(2))
    assert copies.get(1) == copy(1)
    copies.put(3, copy(3))
    assert copies.keys() == [1, 3]
    assert copies.get(2) is None


def test_tensors_that_copies_have_in_common_are_held_and_counted_once() -> None:
    copies: Copies[int] = Copies(limit=9, max_bytes=10_000)
    copies.put(1, copy(1, 2))
    copies.put(2, copy(1, 3))
    first, second = copies.get(1), copies.get(2)
    assert first is not None and second is not None  # noqa: PT018 - narrows both
    assert first.tensors[0] is second.tensors[0]
    assert copies.num_bytes == 300
    copies.discard(1)
    assert copies.num_bytes == 200
    assert copies.get(2) == copy(1, 3)
    copies.discard(2)
    copies.discard(2)
    assert (copies.num_bytes, copies.keys()) == (0, [])


def test_what_was_not_used_for_long_is_let_go() -> None:
    copies: Copies[int] = Copies(limit=9, max_bytes=10_000)
    copies.put(1, copy(1))
    copies.put(2, copy(2))
    between = time.monotonic()
    assert copies.get(1) == copy(1)
    copies.discard_unused(between)
    assert (copies.keys(), copies.num_bytes) == ([1], 100)


def test_bytes_are_bounded_and_what_alone_is_too_large_is_not_held() -> None:
    copies: Copies[int] = Copies(limit=9, max_bytes=250)
    copies.put(1, copy(1))
    copies.put(2, copy(2))
    copies.put(3, copy(3))
    assert copies.keys() == [2, 3]
    copies.put(4, copy(5, 6, 7))
    assert copies.keys() == [2, 3]
    copies.put(3, copy(8))
    assert copies.get(3) == copy(8)
    assert copies.num_bytes == 200
