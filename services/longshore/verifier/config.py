"""What a verifier is told at its start."""

from __future__ import annotations

from pydantic import Field

from longshore.settings import JobProcessSettings


class VerifierSettings(JobProcessSettings):
    """Settings of one verifier process."""

    max_waiting: int = Field(4096, ge=1, description="scores that may wait for a worker; more are refused")
    worker_memory_mb: int = Field(4096, ge=256, description="address space of one scoring process, in MiB")
    worker_start_s: float = Field(120.0, gt=0, description="seconds that a scoring process may take to load")
