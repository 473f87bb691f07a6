"""Damaged payloads for the weight codec; as a script it decodes them with a kernel that a sanitizer watches.

`python codec_fuzz.py LIBRARY SEED COUNT` ends with 0 when every decoding gave the right tensors or an IntegrityError.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import zstandard
from codec_versions import edited, weights

from longshore.errors import IntegrityError
from longshore.weight_store.codec import delta, planes
from longshore.weight_store.codec.native import NativeKernel
from longshore.weight_store.payload import Tensor, tensor_info

START = 40


def sample(rng):
    """Base and new tensors with every way of coding: sparse, with rows left out, in blocks, unchanged."""
    base, new = [], []
    for index, (dtype, shape, share, size) in enumerate(
        [
            ("bfloat16", (40, 64), 0.03, 1),
            ("bfloat16", (64,), 0.5, 1000),
            ("bfloat16", (300, 64), 0.02, 3),
            ("bfloat16", (500,), 1, 0),
            ("float16", (7, 33), 0.2, 1),
            ("float32", (50, 40), 0.01, 5),
            ("float32", (9,), 0, 1),
        ]
    ):
        bits = weights(rng, dtype, int(np.prod(shape)), "trained")
        after = edited(rng, dtype, bits, share, size)
        if index == 2:
            after.reshape(shape)[30:] = bits.reshape(shape)[30:]
        base.append(Tensor(f"t{index}", dtype, shape, bits.tobytes()))
        new.append(Tensor(f"t{index}", dtype, shape, after.tobytes()))
    return base, new


def parts(payload):
    """The start with magic and digest, the header unpacked, and the parts."""
    end = START + int.from_bytes(payload[36:START], "little")
    return payload[:36], zstandard.decompress(payload[START:end]), payload[end:]


def joined(start, header, rest):
    packed = zstandard.compress(header)
    return start + len(packed).to_bytes(4, "little") + packed + rest


def damaged(rng, payload):
    """The payload with something wrong, most often inside of its header or its streams."""
    start, header, rest = (bytearray(part) for part in parts(payload))
    kind = int(rng.integers(6))
    if kind == 0:
        whole = bytearray(payload)
        for _ in range(int(rng.integers(1, 4))):
            whole[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        return bytes(whole)
    if kind == 1:
        return payload[: int(rng.integers(len(payload)))]
    if kind == 2:
        return payload + rng.bytes(int(rng.integers(1, 20)))
    target = header if kind == 3 or not rest else rest
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(target)))
        many = min(len(target) - at, int(rng.integers(1, 9)))
        target[at : at + many] = rng.choice([rng.bytes(many), bytes(many), b"\xff" * many])
    return joined(bytes(start), bytes(header), bytes(rest))


def outcome(decode, new):
    """Decodes: whether it was refused. Anything but an IntegrityError or the right tensors is an error."""
    try:
        got = decode()
    except IntegrityError:
        return True
    assert [bytes(tensor.data) for tensor in got] == [tensor.data for tensor in new]
    return False


def attack(kernel, seed, count):
    """Decodes `count` damaged payloads, verified and not. Returns how many were refused when verified."""
    rng = np.random.default_rng(seed)
    base, new = sample(rng)
    infos = [tensor_info(tensor) for tensor in new]
    deltas, full = delta.encode(base, new, kernel=kernel), planes.encode(new)
    refused = 0
    for _ in range(count):
        payload = damaged(rng, deltas)
        refused += outcome(lambda wrong=payload: delta.decode(wrong, base, infos, kernel=kernel), new)
        # Also what the checksums would refuse is decoded to its end.
        with contextlib.suppress(IntegrityError):
            delta.decode(payload, base, infos, verify=False, kernel=kernel)
        wrong = damaged(rng, full)
        outcome(lambda wrong=wrong: planes.decode(wrong, infos), new)
    return refused


if __name__ == "__main__":
    attack(NativeKernel(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
