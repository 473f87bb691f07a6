from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from longshore.errors import ConfigError
from longshore.relay.config import RelaySettings
from longshore.relay.service import serve


def settings(**changes: object) -> RelaySettings:
    given = {"job_file": "job.json", "broker_url": "unix:///w", "home_broker_url": "unix:///h", "spool_dir": "spool"}
    given |= {"home_weights": "127.0.0.1:9", "weights_dir": "weights"}
    return RelaySettings.model_validate({**given, "site": "west", **changes})


async def test_the_home_site_needs_no_relay() -> None:
    with pytest.raises(ConfigError, match="LONGSHORE_SITE"):
        await serve(settings(site="home"), asyncio.Event())


def test_the_largest_rollout_fits_into_an_empty_spool() -> None:
    assert settings().spool_dir == Path("spool")
    with pytest.raises(ValueError, match="spool_mb"):
        settings(spool_mb=64)
