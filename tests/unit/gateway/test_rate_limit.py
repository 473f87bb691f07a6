from __future__ import annotations

import pytest

from longshore.gateway import rate_limit
from longshore.gateway.rate_limit import Rate, RateLimiter


def test_a_burst_and_then_a_rate() -> None:
    limiter = RateLimiter(Rate(per_s=2, burst=3))
    assert [limiter.take("a", 100.0) for _ in range(4)] == [0, 0, 0, 0.5]
    # Refused ones are not counted.
    assert limiter.take("a", 100.25) == pytest.approx(0.25)
    assert limiter.take("a", 100.5) == 0
    assert limiter.take("b", 100.5) == 0
    assert [limiter.take("a", 1000.0) for _ in range(4)][-1] > 0


def test_only_so_many_callers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_CALLERS", 2)
    limiter = RateLimiter(Rate(per_s=1, burst=1))
    for caller in ("a", "b", "b", "c"):
        limiter.take(caller, 0.0)
    assert len(limiter._buckets) == 2
    assert limiter.take("b", 0.0) > 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    limiter = RateLimiter(Rate(per_s=1, burst=1))
    limiter.take("a", 10.0)
    assert limiter.take("a", 5.0) > 0
