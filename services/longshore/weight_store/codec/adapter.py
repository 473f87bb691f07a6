"""A version as the products that are added to a base's tensors: LoRA's, many times smaller than what they change.

The sum is defined to the bit (product.h): publisher and receivers, on whatever processor, get the same tensors, and a
version's checksums are those of the merged weights, as for any other encoding.

Fields: the products' number, and of each its tensor's number and rank; then the size of the one part, which is the
factors as `planes` codes them: down and up of each product in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from longshore.errors import IntegrityError
from longshore.weight_store.codec import frame, kernels, planes
from longshore.weight_store.codec.kernel import FORMATS, Floats, Kernel
from longshore.weight_store.payload import Tensor, TensorInfo, layout_digest
from longshore.weight_store.product import Product

CODEC = "longshore-adapter/1"

_MAGIC = b"LSA\x01"
# Of a product, in the payload's order.
_SIDES = ("down", "up")

# Of a product: its tensor's number in the version, down and up.
_Factors = tuple[int, Floats, Floats]


def is_sendable(product: Product) -> bool:
    """Whether `encode` takes it: all its numbers are finite, and its rank is at most its tensor's smaller side, beyond
    which it would not be smaller than the tensor."""
    rank, columns = product.down.shape
    finite = all(np.isfinite(_floats(factor)).all() for factor in (product.down, product.up))
    return 1 <= rank <= min(len(_floats(product.up)), columns) and finite


def merge(
    base: Sequence[Tensor], products: Sequence[Product], threads: int = 1, *, kernel: Kernel | None = None
) -> list[Tensor]:
    """The version's tensors: of those that nothing is added to, base's own objects.

    Raises:
        ValueError: a product that does not fit its tensor, or two of one tensor.
    """
    factors = _fitted(base, products)
    made = frame.each(threads, lambda own: _added(base[own[0]], own, kernel or kernels.best()), factors)
    merged = list(base)
    for (index, *_), tensor in zip(factors, made, strict=True):
        merged[index] = tensor
    return merged


def encode(base: Sequence[Tensor], products: Sequence[Product], threads: int = 1) -> bytes:
    """The payload from which `merge(base, products)` is decoded where `base` is.

    Raises:
        ValueError: as `merge`; or a product that is not sendable.
    """
    numbers = [(index, len(down)) for index, down, _ in _fitted(base, products)]
    for product in products:
        if not is_sendable(product):
            raise ValueError(f"tensor {product.name}: its product is too large, or not finite: publish a full encoding")
    sides = [(side, product) for product in products for side in _SIDES]
    inner = planes.encode([replace(getattr(one, side), name=_name(one.name, side)) for side, one in sides], threads)
    head = np.array([len(numbers), *(field for own in numbers for field in own)], np.uint32)
    return frame.pack(_MAGIC, layout_digest(base), [head, np.array([len(inner)], np.uint64)], [inner])


def decode(
    payload: bytes | memoryview,
    base: Sequence[Tensor],
    infos: Sequence[TensorInfo],
    threads: int = 1,
    verify: bool = True,
    base_infos: Sequence[TensorInfo] | None = None,
    *,
    kernel: Kernel | None = None,
) -> list[Tensor]:
    """The tensors that `infos` describe; with `verify` every one's BLAKE3 is compared with its info, as `delta.decode`.

    Raises:
        IntegrityError: naming the first thing that is wrong.
        ValueError: base has another layout than `infos`, or its bytes do not fit a shape.
    """
    if layout_digest(base) != layout_digest(infos):
        raise ValueError("base tensors and infos differ in order, names, dtypes or shapes")
    factors = _read(payload, infos, threads)
    own = kernel or kernels.best()

    def fill(factor: _Factors) -> Tensor:
        made = _added(base[factor[0]], factor, own)
        if verify:
            # While the processor's cache still holds it.
            frame.verify_bytes(made.data, infos[factor[0]])
        return made

    tensors = list(base)
    for (index, *_), tensor in zip(factors, frame.each(threads, fill, factors), strict=True):
        tensors[index] = tensor
    if verify:
        changed = {index for index, *_ in factors}
        frame.verify_unchanged(threads, [i for i in range(len(infos)) if i not in changed], base, infos, base_infos)
    return tensors


def _fitted(base: Sequence[Tensor], products: Sequence[Product]) -> list[_Factors]:
    places = {tensor.name: index for index, tensor in enumerate(base)}
    if len({product.name for product in products}) != len(products):
        raise ValueError("a tensor has two products")
    factors = []
    for product in products:
        index, down, up = places.get(product.name), _floats(product.down), _floats(product.up)
        if index is None or base[index].shape != (len(up), down.shape[1]) or up.shape[1] != len(down):
            raise ValueError(f"tensor {product.name}: the base has none that the product could be added to")
        factors.append((index, down, up))
    return factors


def _read(payload: bytes | memoryview, infos: Sequence[TensorInfo], threads: int) -> list[_Factors]:
    """Raises IntegrityError."""
    fields = frame.Fields(payload, _MAGIC, infos)
    count = int(fields.take(1, np.uint32)[0])
    if count > len(infos):
        raise IntegrityError(f"the payload has {count} products for {len(infos)} tensors")
    numbers = fields.take(2 * count, np.uint32).reshape(count, 2).tolist()
    inner = fields.part(int(fields.take(1, np.uint64)[0]))
    fields.finish()
    wanted: list[TensorInfo] = []
    for index, rank in numbers:
        if index >= len(infos) or len(infos[index].shape) != 2 or not 1 <= rank <= min(infos[index].shape):
            raise IntegrityError(f"the payload has a product of rank {rank} for tensor {index}, which cannot have it")
        rows, columns = infos[index].shape
        for side, shape in zip(_SIDES, ((rank, columns), (rows, rank)), strict=True):
            wanted.append(TensorInfo(_name(infos[index].name, side), "float32", shape, b""))
    if len({index for index, _ in numbers}) != count:
        raise IntegrityError("the payload has two products for one tensor")
    # What they are is proven by their sums.
    factors = [_floats(tensor) for tensor in planes.decode(inner, wanted, threads, verify=False)]
    return [(index, factors[2 * at], factors[2 * at + 1]) for at, (index, _) in enumerate(numbers)]


def _name(tensor: str, side: str) -> str:
    """Of a factor in the payload."""
    return f"{tensor} {side}"


def _added(base: Tensor, factors: _Factors, kernel: Kernel) -> Tensor:
    old = frame.bytes_of(base)
    new = np.empty(len(old), np.uint8)
    kernel.add_product(FORMATS[base.dtype], old, factors[1], factors[2], new)
    return frame.tensor_of(TensorInfo(base.name, base.dtype, base.shape, b""), new)


def _floats(tensor: Tensor) -> Floats:
    """[rows, columns]. Raises ValueError: it is no matrix of float32, or its bytes do not fit its shape."""
    if tensor.dtype != "float32" or len(tensor.shape) != 2:
        raise ValueError(f"tensor {tensor.name}: a factor is a matrix of float32")
    return frame.bytes_of(tensor).view(np.float32).reshape(tensor.shape)
