"""What the weight store is told at its start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from longshore.settings import ProcessSettings


class WeightsSettings(ProcessSettings):
    """One process serves the versions of every job; no two may write to one store at a time."""

    store_url: str = Field(
        min_length=1, description="a folder, or the URL of an object store: s3://bucket/prefix, gs://, az://, file://"
    )
    host_copies_mb: int = Field(
        8192,
        ge=0,
        description="memory for tensors that deltas are decoded against: a larger version can only be published in "
        "full, and merged deltas need three times a version's size",
    )
    sites_file: Path | None = Field(
        None, description="the gateway's list of sites' certificates that are good; absent: no rollout site is let in"
    )
