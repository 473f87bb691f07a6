"""What a learner is told at its start."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from longshore.settings import BrokerSettings, JobProcessSettings


def user_cache() -> Path:
    """Where a user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longshore"


class LearnerSettings(JobProcessSettings, BrokerSettings):
    """Settings of one learner process."""

    weights: str = Field(description="address of the weight store")
    run_dir: Path = Field(description="the job's folder: metrics, checkpoints, summary")
    signing_key_file: Path = Field(description="Ed25519 private key that signs this job's versions")
    blobs_url: str = Field("", description="file:// or s3:// URL where large rollouts lie; empty: none do")
    models_dir: Path = Field(
        default_factory=lambda: user_cache() / "models", description="where GGUF files lie, de-quantised"
    )
    unacknowledged_mb: float = Field(
        256, gt=0, description="rollouts trained on that no durable checkpoint contains; more of them make one early"
    )
