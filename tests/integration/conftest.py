"""Fixtures of several integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_bench import GatewayBench
from redis.asyncio import Redis

from longshore.gateway import driver


@pytest.fixture
async def bench(tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GatewayBench]:
    # A test is not to wait for a quiet broker.
    monkeypatch.setattr(driver, "BLOCK_MS", 20)
    bench = GatewayBench(tmp_path, redis)
    await bench.start()
    yield bench
    await bench.stop()
