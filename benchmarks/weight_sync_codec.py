"""The weight codec against dense XOR + zstd-1 and against the entropy: bytes, encode, decode and verify.

    python benchmarks/weight_sync_codec.py [--quick] [--json FILE]

Three chains of versions at lr 1e-6 (`weight_sync_steps.py`), kept in build/bench/chains. `--quick`: less of them, and
not SmolLM2. Both sides run on one thread, in turns, over the same tensors, with memory that is used again; times are
the thread's own processor time, medians of five.

- peer: a tensor at a time, numpy XOR and python-zstandard at level 1; its decoder checks the same BLAKE3 as ours.
- entropy: of which elements change, and of their steps on the ordered line, given tensor and old exponent, computed
  from the same version's own frequencies. Headers and the model itself are not in it, but are in ours.
- sum of singles: the deltas from each version to the next, over which a merged delta goes at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import blake3
import numpy as np
import numpy.typing as npt
import zstandard

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import Report, parser, run  # noqa: E402
from benchmarks.weight_sync_steps import chain, missing  # noqa: E402
from longshore.weight_store.codec import delta, kernels  # noqa: E402
from longshore.weight_store.codec.kernel_numpy import NumpyKernel  # noqa: E402
from longshore.weight_store.payload import Tensor, TensorInfo, tensor_info  # noqa: E402

CHAINS = Path("build") / "bench" / "chains"
# By chain: the versions whose single deltas are timed, and the strides of merged ones.
FULL = {"gaussian": ((1, 5, 9), ()), "minilm": ((1, 10, 60), (8, 64)), "smollm2": ((1, 10, 60), (8, 64))}
QUICK = {"gaussian-small": ((2,), ()), "minilm": ((2, 8), (8,))}
MERGED_GOAL = {8: 0.65, 64: 0.35}

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
Bits = npt.NDArray[np.uint16]


def _bytes(tensor: Tensor) -> Bytes:
    return np.frombuffer(tensor.data, np.uint8)


class Peer:
    """Dense XOR and zstd-1, as slime, SkyRL and NeMo-RL have it, with all memory made ahead."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._scratch = np.empty(max(len(tensor.data) for tensor in tensors), np.uint8)
        self._made = [np.empty(len(tensor.data), np.uint8) for tensor in tensors]
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[bytes]:
        packed = []
        for before, after in zip(old, new, strict=True):
            xor = self._scratch[: len(before.data)]
            np.bitwise_xor(_bytes(before), _bytes(after), out=xor)
            packed.append(self._compressor.compress(xor.data))
        return packed

    def decode(self, packed: Sequence[bytes], old: Sequence[Tensor], infos: Sequence[TensorInfo]) -> list[Bytes]:
        for payload, before, made, info in zip(packed, old, self._made, infos, strict=True):
            xor = self._scratch[: len(made)]
            filled = self._decompressor.stream_reader(payload).readinto(xor.data)
            np.bitwise_xor(xor, _bytes(before), out=made)
            assert filled == len(made)
            assert blake3.blake3(made.data).digest() == info.blake3
        return self._made


class Ours:
    """Our codec, with memory for decoded tensors that is used again, as the peer's."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._free: dict[int, list[Bytes]] = {}
        for tensor in tensors:
            self._free.setdefault(len(tensor.data), []).append(np.zeros(len(tensor.data), np.uint8))

    def decode(
        self, payload: bytes, old: Sequence[Tensor], infos: Sequence[TensorInfo], base_infos: Sequence[TensorInfo]
    ) -> list[Tensor]:
        return delta.decode(payload, old, infos, base_infos=base_infos, allocate=self._take)

    def _take(self, size: int) -> Bytes:
        memory = self._free[size].pop(0)
        self._free[size].append(memory)
        return memory


@dataclass
class Timed:
    """Processor seconds of each round."""

    encode: list[float]
    decode: list[float]


@dataclass
class Single:
    """What was found of one version's delta from the one before."""

    ours: int
    peers: int
    entropy: float
    elements: int
    changed: int
    our_times: Timed
    peer_times: Timed
    # Seconds of BLAKE3 alone, over all tensors.
    hashing: float


async def measure(report: Report, args: argparse.Namespace) -> None:
    if isinstance(kernels.best(), NumpyKernel):
        report.skip("all", "the codec's kernel was not built: run `python hatch_build.py` with a C compiler")
        return
    for name, (versions, strides) in (QUICK if args.quick else FULL).items():
        absent = missing(name)
        if absent is not None:
            report.skip(name, f"{absent} is not installed: see benchmarks/models.txt", "<= 0.45; <= 1.1")
            continue
        report.note(f"{name}: its versions (made once, kept in {CHAINS})")
        made = chain(name, max([*versions, *strides]), CHAINS)
        report.note(f"{name}: single deltas")
        rounds = 3 if args.quick else 5
        _report_singles(report, name, [_single(*pair, rounds) for pair in _pairs(made.versions(), versions)])
        for stride in strides:
            report.note(f"{name}: {stride} versions behind")
            _report_merged(report, name, stride, made.versions())


def _pairs(versions: Iterator[list[Tensor]], wanted: Sequence[int]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    before: list[Tensor] = []
    for number, tensors in enumerate(islice(versions, max(wanted) + 1)):
        if number in wanted:
            yield before, tensors
        before = tensors


def _single(old: Sequence[Tensor], new: Sequence[Tensor], rounds: int) -> Single:
    infos, base_infos = ([tensor_info(tensor) for tensor in tensors] for tensors in (new, old))
    peer, ours = Peer(new), Ours(new)
    times, peer_times = Timed([], []), Timed([], [])
    hashing = []
    # The first round only warms up.
    for _ in range(rounds + 1):
        seconds, payload = _timed(lambda: delta.encode(old, new))
        times.encode.append(seconds)
        seconds, packed = _timed(lambda: peer.encode(old, new))
        peer_times.encode.append(seconds)
        seconds, got = _timed(lambda payload=payload: ours.decode(payload, old, infos, base_infos))  # type: ignore[misc]
        times.decode.append(seconds)
        seconds, made = _timed(lambda packed=packed: peer.decode(packed, old, infos))  # type: ignore[misc]
        peer_times.decode.append(seconds)
        hashing.append(_timed(lambda: [blake3.blake3(tensor.data).digest() for tensor in new])[0])
    assert all(bytes(one.data) == tensor.data == two.tobytes() for one, two, tensor in zip(got, made, new, strict=True))
    changed, elements, bits = 0, 0, 0.0
    for before, after in zip(old, new, strict=True):
        pair = np.frombuffer(before.data, np.uint16), np.frombuffer(after.data, np.uint16)
        changed += int(np.count_nonzero(pair[0] != pair[1]))
        elements += len(pair[0])
        bits += entropy(*pair)
    for own in (times, peer_times):
        del own.encode[0], own.decode[0]
    total = sum(len(part) for part in packed)
    return Single(len(payload), total, bits / 8, elements, changed, times, peer_times, statistics.median(hashing[1:]))


def _timed(do: Callable[[], T]) -> tuple[float, T]:
    start = time.thread_time()
    result = do()
    return time.thread_time() - start, result


def entropy(before: Bits, after: Bits) -> float:
    """Bits: of which elements of one tensor change, and of their signed steps, given their old exponents."""
    places = np.flatnonzero(before != after)
    exponents = (before >> 7) & 0xFF
    elements = np.bincount(exponents, minlength=256).astype(float)
    changed = np.bincount(exponents[places], minlength=256).astype(float)
    steps = _ordered(after[places]) - _ordered(before[places])
    pairs, counts = np.unique(exponents[places].astype(np.int64) << 32 | (steps + (1 << 31)), return_counts=True)
    of_steps = counts * np.log2(changed[pairs >> 32] / counts)
    return float(_bits(elements, changed) + _bits(elements, elements - changed) + of_steps.sum())


def _bits(elements: npt.NDArray[np.float64], some: npt.NDArray[np.float64]) -> float:
    there = some > 0
    return float((some[there] * np.log2(elements[there] / some[there])).sum())


def _ordered(bits: Bits) -> npt.NDArray[np.int64]:
    magnitude = (bits & 0x7FFF).astype(np.int64)
    return np.where(bits >> 15, -magnitude - 1, magnitude)


def _report_singles(report: Report, name: str, found: Sequence[Single]) -> None:
    ours, peers = sum(one.ours for one in found), sum(one.peers for one in found)
    changed, elements = sum(one.changed for one in found), sum(one.elements for one in found)
    report.add(f"{name}, changed", 100 * changed / elements, "%", against=f"of {elements // len(found):,} elements")
    report.add(f"{name}, bytes", ours / peers, "x", against="dense XOR + zstd-1", at_most=0.45)
    bound = sum(one.entropy for one in found)
    report.add(f"{name}, bytes", ours / bound, "x", against="entropy given tensor and old exponent", at_most=1.1)
    report.add(
        f"{name}, bits a changed element", 8 * ours / changed, "bit", against=f"{8 * bound / changed:.3g} entropy"
    )
    encode = [_ratio(one.peer_times.encode, one.our_times.encode) for one in found]
    decode = [_ratio(one.peer_times.decode, one.our_times.decode) for one in found]
    gigabytes = 2e-9 * elements / len(found)
    at = gigabytes / statistics.median(second for one in found for second in one.our_times.encode)
    report.add(f"{name}, encode", statistics.median(encode), "x", against=f"peer's; ours {at:.2g} GB/s", at_least=1)
    at = gigabytes / statistics.median(second for one in found for second in one.our_times.decode)
    report.add(
        f"{name}, decode + verify", statistics.median(decode), "x", against=f"peer's; ours {at:.2g} GB/s", at_least=2
    )
    # No decoder that computes the same checksum can be faster against this peer.
    limit = statistics.median(statistics.median(one.peer_times.decode) / one.hashing for one in found)
    report.add(f"{name}, decode + verify if decoding took no time", limit, "x", against="peer's; BLAKE3 alone")


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(theirs) / statistics.median(ours)


def _report_merged(report: Report, name: str, stride: int, versions: Iterator[list[Tensor]]) -> None:
    singles = 0
    first = before = next(versions)
    for tensors in islice(versions, stride):
        singles += len(delta.encode(before, tensors))
        before = tensors
    merged = len(delta.encode(first, before))
    report.add(
        f"{name}, {stride} versions behind",
        merged / singles,
        "x",
        against=f"{singles:,} bytes of single deltas",
        at_most=MERGED_GOAL[stride],
    )


if __name__ == "__main__":
    sys.exit(run(__doc__ or "", measure, made=parser(__doc__ or "")))
