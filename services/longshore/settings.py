"""What a process is told at its start, by environment variables: the same on a laptop, in compose and in Kubernetes.

What is secret may come in files instead: LONGSHORE_SECRETS_DIR names a folder in which, for example, the file
`longshore_broker_url` stands for the variable LONGSHORE_BROKER_URL. A variable outweighs its file; an empty one is as
good as none.

Every process folder's `config.py` extends one of these. A JobSpec says what to train; settings say where things are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Self

import pydantic
from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from longshore.config import JobSpec
from longshore.errors import ConfigError
from longshore.types import JobRef


class ProcessSettings(BaseSettings):
    """Settings of every process. Each field is the variable LONGSHORE_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="LONGSHORE_", env_ignore_empty=True, extra="ignore", frozen=True)

    listen: str = Field("127.0.0.1:0", description="host:port of the gRPC server; port 0: any free one")
    metrics_listen: str = Field("127.0.0.1:0", description="host:port of /metrics")
    name: str = Field("process", description="this replica's name, for example actor-0")
    site: str = Field("home", description="the site that this process runs in")
    log_level: str = Field("info", description="debug, info, warning or error")
    drain_s: float = Field(5.0, gt=0, description="seconds that SIGTERM leaves for work in progress")

    @classmethod
    def from_environment(cls) -> Self:
        """Reads the variables. Raises ConfigError naming every one that is missing or wrong."""
        folder = os.environ.get("LONGSHORE_SECRETS_DIR") or None
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"LONGSHORE_SECRETS_DIR {folder}: there is no such folder")
        try:
            return cls(_secrets_dir=folder)
        except pydantic.ValidationError as error:
            faults = [
                f"LONGSHORE_{'_'.join(str(part) for part in entry['loc']).upper()}: {entry['msg']}"
                for entry in error.errors(include_url=False)
            ]
            raise ConfigError("; ".join(faults)) from None


class JobFile(BaseModel):
    """What the gateway writes for a job's processes, as JSON."""

    project: str
    job: str
    spec: JobSpec
    # Ed25519 public key of the learner, 32 bytes as hex; manifests and pointers are checked against it.
    learner_public_key: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def ref(self) -> JobRef:
        return JobRef(self.project, self.job)


class JobProcessSettings(ProcessSettings):
    """Settings of the processes that belong to one job."""

    job_file: Path = Field(description="path of the job's job.json")

    def load_job(self) -> JobFile:
        """Raises ConfigError when the file is missing or malformed."""
        try:
            return JobFile.model_validate(json.loads(self.job_file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"LONGSHORE_JOB_FILE {self.job_file}: {error}") from None


class BrokerSettings(BaseSettings):
    """Where the broker is; mixed into the settings of the processes that use it."""

    # The last base's configuration wins, so it has to be the same one.
    model_config = SettingsConfigDict(env_prefix="LONGSHORE_", env_ignore_empty=True, extra="ignore", frozen=True)

    broker_url: str = Field(description="redis://, rediss:// or unix:// URL of the site's broker")
