"""The cheapest way to a version: a pure function of the encodings on hand and of what the receiver has."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from longshore.proto.v1 import weights_pb2

# Stands for having nothing: full encodings start from here. No version is negative.
_NOTHING = -1


@dataclass(frozen=True)
class Step:
    """One encoding on the way; what it is decoded against is the result of the step before, or what one has."""

    # What it decodes to.
    version: int
    encoding: weights_pb2.Encoding


# Also as the wire has it.
S = TypeVar("S", Step, weights_pb2.PathStep)


def cheapest_path(
    encodings: Mapping[int, Sequence[weights_pb2.Encoding]], have: Collection[int], want: int, codecs: Collection[str]
) -> list[Step] | None:
    """The path of the fewest bytes, and among those of the fewest steps.

    Args:
        encodings: by the version that they decode to, of one weight set.
        have: versions whose tensors the receiver holds; a path may start from any, or from nothing with a full one.
        codecs: what the receiver can decode.

    Returns:
        The steps in order, none when `want` is held already; None when there is no way.
    """
    if want in have:
        return []
    onward: dict[int, list[Step]] = {}
    for version, items in encodings.items():
        for item in items:
            if item.codec in codecs:
                base = item.base_version if item.HasField("base_version") else _NOTHING
                onward.setdefault(base, []).append(Step(version, item))
    starts = {_NOTHING, *have}
    # Bytes and steps to a version, and the version and step that lead there.
    best: dict[int, tuple[int, int]] = dict.fromkeys(starts, (0, 0))
    arrived: dict[int, tuple[int, Step]] = {}
    queue = [(0, 0, start) for start in starts]
    heapq.heapify(queue)
    while queue:
        size, count, version = heapq.heappop(queue)
        if version == want:
            return _steps_to(want, arrived)
        if (size, count) > best[version]:
            continue
        for step in onward.get(version, ()):
            cost = (size + step.encoding.size, count + 1)
            if step.version not in best or cost < best[step.version]:
                best[step.version] = cost
                arrived[step.version] = (version, step)
                heapq.heappush(queue, (*cost, step.version))
    return None


def reachable(encodings: Mapping[int, Sequence[weights_pb2.Encoding]], codecs: Collection[str]) -> set[int]:
    """The versions that someone who holds nothing can get to."""
    onward: dict[int, list[int]] = {}
    for version, items in encodings.items():
        for item in items:
            if item.codec in codecs:
                onward.setdefault(item.base_version if item.HasField("base_version") else _NOTHING, []).append(version)
    found: set[int] = set()
    waiting = [_NOTHING]
    while waiting:
        for version in onward.get(waiting.pop(), ()):
            if version not in found:
                found.add(version)
                waiting.append(version)
    return found


def legs(path: Sequence[S]) -> list[list[S]]:
    """A path, cut before every adapter. Where a leg ends is a version that who follows the job should hold: all later
    adapters are decoded against it, and none against what they give."""
    cut: list[list[S]] = []
    for step in path:
        if not cut or step.encoding.kind == weights_pb2.ENCODING_KIND_ADAPTER:
            cut.append([])
        cut[-1].append(step)
    return cut


def path_bytes(steps: Sequence[Step]) -> int:
    """What fetching a path costs."""
    return sum(step.encoding.size for step in steps)


def path_kind(steps: Sequence[Step] | None) -> str:
    """For counting: unreachable, nothing, full, delta, merged, adapter, deltas (several), or anchored (full, then
    others)."""
    if steps is None:
        return "unreachable"
    if not steps:
        return "nothing"
    first = steps[0].encoding.kind
    if first == weights_pb2.ENCODING_KIND_FULL:
        return "full" if len(steps) == 1 else "anchored"
    if len(steps) > 1:
        return "deltas"
    if first == weights_pb2.ENCODING_KIND_ADAPTER:
        return "adapter"
    return "merged" if first == weights_pb2.ENCODING_KIND_MERGED_DELTA else "delta"


def _steps_to(want: int, arrived: Mapping[int, tuple[int, Step]]) -> list[Step]:
    steps = []
    version = want
    while version in arrived:
        version, step = arrived[version]
        steps.append(step)
    return steps[::-1]
