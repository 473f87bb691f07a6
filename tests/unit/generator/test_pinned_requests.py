"""Which versions a generator brings for requests that are pinned to one, before the engine sees them."""

from __future__ import annotations

import asyncio
import time

import pytest

from longshore.errors import IntegrityError, LongshoreError, NotFound, Unavailable
from longshore.generator.calls import Calls
from longshore.generator.engine import EngineRequest, EngineStatus
from longshore.types import JobRef, Sampling, VersionConstraint


class Resident:
    """An engine as far as it is asked here: version 5 is served, 3 is beside it."""

    def __init__(self, version: int | None = 5) -> None:
        self.version = version

    def status(self) -> EngineStatus:
        return EngineStatus(self.version, 0, 0, 0.0, (3,))


async def brought(
    low: int | None,
    high: int | None,
    *,
    error: LongshoreError | None = None,
    served: int | None = 5,
    seconds: float = 10.0,
    takes_s: float = 0.0,
) -> list[int]:
    """What is brought for a request that accepts low..high."""
    asked: list[int] = []

    async def keep(version: int) -> None:
        asked.append(version)
        await asyncio.sleep(takes_s)
        if error is not None:
            raise error

    calls = Calls(JobRef("p", "j"))
    calls.keep = keep
    calls.engine = Resident(served)  # type: ignore[assignment]
    bounds = VersionConstraint(low, high)
    request = EngineRequest("r", (1,), Sampling(1.0, 4), time.monotonic() + seconds, bounds)
    await calls.have_resident(request)
    return asked


@pytest.mark.parametrize(
    ("low", "high", "asked"),
    [
        (2, 2, [2]),
        # A generator may follow a channel that is behind head.
        (8, 8, [8]),
        (5, 5, []),
        (3, 3, []),
        (2, 3, []),
        (None, 2, []),
        (8, None, []),
        (None, None, []),
    ],
)
async def test_what_is_pinned_and_not_resident_is_brought(low: int | None, high: int | None, asked: list[int]) -> None:
    assert await brought(low, high) == asked


@pytest.mark.parametrize("error", [NotFound("no such version"), Unavailable("no room")])
async def test_what_may_be_still_to_come_is_left_to_the_engine(error: LongshoreError) -> None:
    assert await brought(8, 8, error=error) == [8]
    with pytest.raises(type(error)):
        await brought(2, 2, error=error)


async def test_a_version_that_cannot_be_proven_is_an_error_above_and_below() -> None:
    for version in (2, 8):
        with pytest.raises(IntegrityError):
            await brought(version, version, error=IntegrityError("not proven"))


async def test_the_requests_deadline_bounds_the_bringing() -> None:
    with pytest.raises(Unavailable, match="version 2 could not be brought within"):
        await brought(2, 2, seconds=0.02, takes_s=10.0)


async def test_nothing_is_brought_before_anything_is_served() -> None:
    assert await brought(2, 2, served=None) == []
