"""The planner against an exhaustive search over every simple path."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.proto.v1 import weights_pb2
from longshore.weight_store.decoding import CODECS, DELTA, PLANES, SAFETENSORS
from longshore.weight_store.planner import Step, cheapest_path, path_bytes, path_kind, reachable

FULL, SINGLE, MERGED = (
    weights_pb2.ENCODING_KIND_FULL,
    weights_pb2.ENCODING_KIND_DELTA,
    weights_pb2.ENCODING_KIND_MERGED_DELTA,
)


def encoding(size: int, base: int | None = None, codec: str | None = None, kind: int | None = None):
    default = FULL if base is None else SINGLE
    return weights_pb2.Encoding(
        kind=default if kind is None else kind,  # type: ignore[arg-type]
        base_version=base,
        size=size,
        codec=codec or (PLANES if base is None else DELTA),
        sha256=bytes([size % 256]) * 32,
    )


@st.composite
def worlds(draw):
    """Few versions with many encodings each, so that most have several ways that differ."""
    count = draw(st.integers(1, 6))
    bases = st.none() | st.integers(0, count)
    codecs = st.sampled_from([*CODECS, *CODECS, "other/1"])
    encodings = {
        version: [
            encoding(size, base, codec)
            for size, base, codec in draw(st.lists(st.tuples(st.integers(1, 20), bases, codecs), max_size=6))
        ]
        for version in range(count)
    }
    have = draw(st.sets(st.integers(0, count), max_size=2))
    known = draw(st.sampled_from([CODECS, CODECS, (SAFETENSORS, DELTA), ()]))
    return encodings, have, draw(st.integers(0, count)), known


def brute_force(encodings, have, want, codecs) -> tuple[int, int] | None:
    """Bytes and steps of the best path, from all sequences of distinct versions."""
    if want in have:
        return (0, 0)
    costs = []
    others = [version for version in encodings if version != want]
    for count in range(len(others) + 1):
        for between in itertools.permutations(others, count):
            chain = [*between, want]
            for start in {None, *have}:
                cost = 0
                for base, version in itertools.pairwise([start, *chain]):
                    sizes = [
                        item.size
                        for item in encodings.get(version, ())
                        if item.codec in codecs
                        and (item.base_version if item.HasField("base_version") else None) == base
                    ]
                    if not sizes:
                        break
                    cost += min(sizes)
                else:
                    costs.append((cost, len(chain)))
    return min(costs, default=None)


@settings(max_examples=250, deadline=None)
@given(worlds())
def test_the_path_is_the_cheapest_there_is(world) -> None:
    encodings, have, want, codecs = world
    expected = brute_force(encodings, have, want, codecs)
    steps = cheapest_path(encodings, have, want, codecs)
    if steps is None:
        assert expected is None
        return
    assert (path_bytes(steps), len(steps)) == expected
    position = None
    for number, step in enumerate(steps):
        assert step.encoding in encodings[step.version]
        assert step.encoding.codec in codecs
        base = step.encoding.base_version if step.encoding.HasField("base_version") else None
        assert base == position or (number == 0 and base in have)
        position = step.version
    assert not steps or position == want


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_what_is_within_reach_has_a_path_from_nothing(world) -> None:
    encodings, _, _, codecs = world
    expected = {version for version in range(8) if cheapest_path(encodings, (), version, codecs) is not None}
    assert reachable(encodings, codecs) == expected


def test_a_merged_delta_is_taken_where_it_is_smaller_than_the_singles() -> None:
    encodings = {v: [encoding(10, v - 1)] for v in range(1, 9)}
    encodings[0] = [encoding(1000)]
    encodings[8].append(encoding(50, 0, kind=MERGED))
    kinds = [path_kind(cheapest_path(encodings, have, 8, CODECS)) for have in ([0], [4], [7], [8], [], [-5])]
    assert kinds == ["merged", "deltas", "delta", "nothing", "anchored", "anchored"]
    assert path_kind(cheapest_path(encodings, [], 0, CODECS)) == "full"
    assert path_kind(cheapest_path(encodings, [], 8, [SAFETENSORS])) == "unreachable"
    assert cheapest_path(encodings, [4], 8, CODECS) == [Step(v, encodings[v][0]) for v in range(5, 9)]
