"""What a relay is told at its start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from longshore.settings import BrokerSettings, JobProcessSettings


class RelaySettings(JobProcessSettings, BrokerSettings):
    """Settings of one relay process; `broker_url` is the broker of its own site."""

    site_file: Path | None = Field(
        None, description="what `longshore site join` wrote: says which site this is, where home is, and what is shown"
    )
    home_broker_url: str = Field(
        "", description="redis://, rediss:// or unix:// URL of the home site's broker, where there is no SITE_FILE"
    )
    home_weights: str = Field("", description="host:port of the home site's weight store, where there is no SITE_FILE")
    weights_dir: Path = Field(description="folder of the site's weight store; kept, it survives restarts without home")
    host_copies_mb: int = Field(4096, ge=1, description="most memory of versions held to decode against, in MiB")
    blobs_url: str = Field("", description="file:// or s3:// URL of the site's large rollouts; empty: none")
    home_blobs_url: str = Field("", description="the same at the home site")
    spool_dir: Path = Field(description="folder of the spool; it must outlive the process")
    # A rollout has at most 64 MiB, so it always fits into an empty spool.
    spool_mb: int = Field(1024, ge=128, description="bound of the spool on the disk, in MiB")
    allowance: int = Field(128, ge=1, description="tickets that the site may hold at a time")
