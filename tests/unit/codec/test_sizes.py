"""What payloads cost, and tensors that cross the borders of pieces and sections."""

import tracemalloc

import numpy as np
import pytest
from codec_versions import ITEM, edited, weights

from longshore.weight_store.codec import delta, native, plan, planes
from longshore.weight_store.codec.kernel_numpy import NumpyKernel
from longshore.weight_store.payload import Tensor, tensor_info

# Magic, digest, and a header of a few fields.
SLACK = 120


def pair(dtype, shape, share, size, kind="trained", seed=0, name="w"):
    rng = np.random.default_rng(seed)
    bits = weights(rng, dtype, int(np.prod(shape)), kind)
    new = edited(rng, dtype, bits, share, size)
    return Tensor(name, dtype, shape, bits.tobytes()), Tensor(name, dtype, shape, new.tobytes())


def round_trip(base, new, **options):
    payload = delta.encode(base, new, **options)
    got = delta.decode(payload, base, [tensor_info(tensor) for tensor in new], **options)
    assert [bytes(tensor.data) for tensor in got] == [tensor.data for tensor in new]
    return payload


@pytest.mark.parametrize("dtype", ITEM)
@pytest.mark.parametrize("size", [1, 40, 0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 1])
# Numpy's gives the same bytes, but takes minutes.
@pytest.mark.parametrize("kernel", native.LIBRARIES, indirect=True)
def test_no_change_costs_more_than_the_tensor(dtype, share, size, kernel):
    base, new = pair(dtype, (300, 700), share, size, "any" if size == 0 else "trained")
    assert len(round_trip([base], [new], kernel=kernel)) <= 1.02 * len(new.data) + SLACK


@pytest.mark.parametrize("dtype", ITEM)
def test_planes_cost_no_more_than_the_tensor(dtype):
    _, noise = pair(dtype, (500, 500), 1, 0, "any")
    assert len(planes.encode([noise])) <= 1.02 * len(noise.data) + SLACK
    _, trained = pair(dtype, (500, 500), 0, 1)
    assert len(planes.encode([trained])) < 0.95 * len(trained.data)


def test_unchanged_tensors_cost_nothing(kernel):
    base = [pair("bfloat16", (50, 40), 0, 1, seed=seed, name=f"t{seed}")[0] for seed in range(100)]
    assert len(round_trip(base, base, kernel=kernel)) < SLACK


def test_a_sparse_change_is_near_its_entropy(kernel):
    """Positions and steps of one unit: within a tenth of the entropy given the exponents, and what a header takes."""
    base, new = pair("bfloat16", (256, 1024), 0.01, 1)
    before, after = (np.frombuffer(tensor.data, np.uint16) for tensor in (base, new))
    changed, exponents = before != after, (before >> 7) & 0xFF
    bits = float(np.count_nonzero(changed))
    for exponent in np.unique(exponents):
        share = changed[exponents == exponent].mean()
        for rate in (share, 1 - share):
            bits -= (exponents == exponent).sum() * rate * np.log2(rate or 1)
    assert len(round_trip([base], [new], kernel=kernel)) < 1.1 * bits / 8 + SLACK


def test_rows_in_which_nothing_changed_are_left_out(kernel):
    """An embedding of which few rows were trained."""
    base, new = pair("bfloat16", (4000, 64), 0.05, 1)
    after = np.frombuffer(base.data, np.uint16).reshape(4000, 64).copy()
    rows = np.random.default_rng(1).choice(4000, 40, replace=False)
    after[rows] = np.frombuffer(new.data, np.uint16).reshape(4000, 64)[rows]
    some = Tensor("w", "bfloat16", (4000, 64), after.tobytes())
    # 40 rows of 4000: 0.08 bits a row; 5 % of their elements: 6.3 bits a change.
    assert len(round_trip([base], [some], kernel=kernel)) < 1.3 * (4000 * 0.08 + 128 * 6.3) / 8 + SLACK


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (63,), (64,), (65,), (1, 64), (3, 1, 2)])
@pytest.mark.parametrize("dtype", ITEM)
def test_tensors_of_all_small_shapes(dtype, shape, kernel):
    base, new = pair(dtype, shape, 0.3, 1)
    round_trip([base], [new], kernel=kernel)
    assert bytes(planes.decode(planes.encode([new]), [tensor_info(new)])[0].data) == new.data


@pytest.mark.parametrize("piece", [64, 1024])
def test_tensors_cross_the_borders_of_pieces_and_sections(piece, kernel, monkeypatch):
    monkeypatch.setattr(plan, "PIECE", piece)
    monkeypatch.setattr(plan, "SECTION", 2500)
    shapes = [(90, 40), (7,), (300, 33), (64, 64), (5000,), (2,)]
    every = [
        pair(dtype, shape, 0.05, 2, seed=index, name=f"{dtype}{index}")
        for index, shape in enumerate(shapes)
        for dtype in ("bfloat16", "float32")
    ]
    base, new = zip(*every, strict=True)
    payload = round_trip(base, new, kernel=kernel)
    assert delta.encode(base, new, threads=3, kernel=kernel) == payload
    infos = [tensor_info(tensor) for tensor in new]
    got = delta.decode(payload, base, infos, threads=3, kernel=kernel)
    assert [bytes(tensor.data) for tensor in got] == [tensor.data for tensor in new]


def test_sections_are_cut_the_same_however_many_rows_are_left_out():
    rng = np.random.default_rng(2)
    for share in (0.01, 0.5, 1):
        rows = rng.random(2000) < share
        cuts = [plan.cut(0, 2000 * 300, rows), plan.cut(1, 10**6, None), plan.cut(2, 5, None)]
        covered = {own.tensor: np.zeros(10**6, np.int64) for own in cuts}
        sectioner = plan.Sectioner()
        sections = [section for own in cuts for section in sectioner.add(own)] + sectioner.finish()
        for part in (part for section in sections for part in section):
            assert part.cut.sizes[part.pieces].sum() == part.cut.count[part.segments].sum()
            starts, counts = part.cut.start[part.segments], part.cut.count[part.segments]
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                covered[part.cut.tensor][start : start + count] += 1
        assert np.array_equal(covered[0][: 2000 * 300].reshape(2000, 300), np.repeat(rows[:, None], 300, axis=1))
        assert covered[1].all()
        assert covered[2].sum() == 5


def test_memory_may_be_used_again():
    base, new = pair("bfloat16", (100, 100), 0.02, 1)
    memory = np.full(len(new.data), 255, np.uint8)
    payload = delta.encode([base], [new])
    got = delta.decode(payload, [base], [tensor_info(new)], allocate=lambda size: memory[:size])
    assert bytes(got[0].data) == memory.tobytes() == new.data


def test_what_seemed_sparse_and_is_not_is_coded_in_blocks(monkeypatch):
    """A section whose streams do not fit is given up; the others stay."""
    monkeypatch.setattr(plan, "SECTION", 3000)
    every = [pair("bfloat16", (3000,), share, 1, seed=index, name=f"t{index}") for index, share in enumerate([0.1] * 3)]
    base, new = zip(*every, strict=True)
    kept = OwnKernel.emit
    calls = []

    def emit(self, scans, model, room):
        calls.append(scans)
        return None if len(calls) == 2 else kept(self, scans, model, room)

    whole = len(round_trip(base, new, kernel=OwnKernel()))
    monkeypatch.setattr(OwnKernel, "emit", emit)
    assert len(round_trip(base, new, kernel=OwnKernel())) > whole
    # Three sections; then two without the second tensor.
    assert len(calls) == 5


class OwnKernel(NumpyKernel):
    """A kernel of the test's own."""


def test_encoding_takes_memory_for_some_tensors_and_not_for_all(native_kernels, monkeypatch):
    monkeypatch.setattr(plan, "SECTION", 50_000)
    every = [pair("bfloat16", (100, 200), 0.1, 1, seed=index, name=f"t{index}") for index in range(40)]
    base, new = zip(*every, strict=True)
    peaks = []
    delta.encode(base[:5], new[:5], kernel=native_kernels[0])
    for count in (5, 40):
        tracemalloc.start()
        try:
            payload = delta.encode(base[:count], new[:count], kernel=native_kernels[0])
            peaks.append(tracemalloc.get_traced_memory()[1] - 2 * len(payload))
        finally:
            tracemalloc.stop()
    # A tensor's changes alone, 24 kB each, would be 840 kB more.
    assert peaks[1] < peaks[0] + 200_000
