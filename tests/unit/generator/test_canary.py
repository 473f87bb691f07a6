"""What proves a version, and within which bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from longshore.errors import IntegrityError
from longshore.generator.canary import BOUNDS, Gap, Proof, demand, holds
from longshore.generator.metrics import CANARY_GAP, UNPROVEN, EngineMetrics
from longshore.types import JobRef
from longshore.weights.client import CanaryProbe

PROOF = Proof((CanaryProbe((1, 2, 3), (-1.0, -2.0)), CanaryProbe((4, 5), (-3.0,))))


def scores(*values: Sequence[float]) -> Gap:
    answers = iter(values)
    return PROOF.gap(lambda token_ids: next(answers))


def test_the_gap_is_over_all_canaries() -> None:
    gap = scores((-1.0, -2.25), (-3.5,))
    assert gap == Gap(largest=0.5, mean=0.25)


def test_the_end_of_a_canary_may_be_left_out() -> None:
    assert scores((-1.5,), (-3.0,)) == Gap(largest=0.5, mean=0.25)


@pytest.mark.parametrize("answers", [((), ()), ((-1.0, math.nan), (-3.0,)), ((-1.0, -math.inf), (-3.0,))])
def test_what_is_no_number_proves_nothing(answers: tuple[tuple[float, ...], ...]) -> None:
    gap = scores(*answers)
    assert not any(holds(gap, dtype) for dtype in BOUNDS)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_both_bounds_are_kept(dtype: str) -> None:
    bound = BOUNDS[dtype]
    demand(bound, dtype)
    for gap in (Gap(bound.largest * 1.01, 0.0), Gap(bound.largest, bound.mean * 1.01), Gap(math.nan, math.nan)):
        with pytest.raises(IntegrityError, match=f"is right in {dtype}"):
            demand(gap, dtype)


@pytest.mark.parametrize(
    ("proof", "reason"),
    [
        (Proof(()), "no canary"),
        (Proof((CanaryProbe((1,), ()),)), "no canary"),
        (Proof((CanaryProbe((1, 6), (-1.0,)),)), "vocabulary"),
        (Proof((CanaryProbe((-1, 5), (-1.0,)),)), "vocabulary"),
    ],
)
def test_a_proof_that_no_engine_could_give(proof: Proof, reason: str) -> None:
    PROOF.check(6)
    with pytest.raises(IntegrityError, match=reason):
        proof.check(6)


def test_what_was_measured_shows_whether_it_holds_or_not() -> None:
    job = ("default", "canary")
    metrics = EngineMetrics(JobRef(*job))
    metrics.prove(Gap(1e-5, 1e-6), "float32")
    with pytest.raises(IntegrityError):
        metrics.prove(Gap(0.5, 0.25), "float32")
    assert CANARY_GAP.labels(*job, "max")._value.get() == 0.5
    assert CANARY_GAP.labels(*job, "mean")._value.get() == 0.25
    assert UNPROVEN.labels(*job)._value.get() == 1
