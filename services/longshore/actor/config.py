"""What an actor is told at its start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from longshore.settings import BrokerSettings, JobProcessSettings


class ActorSettings(JobProcessSettings, BrokerSettings):
    """Settings of one actor process."""

    generator: str = Field(description="the site's generators: host:port, unix:PATH or file:PATH, with commas between")
    verifier: str = Field(description="address of the verifier")
    weights: str = Field(description="address of the weight store, for the tokenizer")
    generate_timeout_s: float = Field(3600.0, gt=0, description="seconds that one reply may take, waiting included")
    environment_timeout_s: float = Field(60.0, gt=0, description="seconds that an environment may take for a turn")
    peer_patience_s: float = Field(600.0, gt=0, description="seconds that a generator or verifier may be away")
    broker_patience_s: float = Field(60.0, gt=0, description="seconds that the broker may be away")
    spool_dir: Path | None = Field(None, description="folder of the spool; it must outlive the process; absent: none")
    # A rollout has at most 64 MiB, so it always fits into an empty spool.
    spool_mb: int = Field(512, ge=128, description="bound of the spool on the disk, in MiB")
    blobs_url: str = Field("", description="file:// or s3:// URL of the site's large rollouts; empty: none")
