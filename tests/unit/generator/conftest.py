"""Counters are the process's: each test begins with none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longshore.generator.metrics import REFUSED


@pytest.fixture(autouse=True)
def _clear_refusals() -> Iterator[None]:
    yield
    REFUSED.clear()
