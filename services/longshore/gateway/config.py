"""What a gateway is told at its start."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from longshore.settings import BrokerSettings, ProcessSettings


class GatewaySettings(ProcessSettings, BrokerSettings):
    """Settings of one gateway process."""

    http_listen: str = Field("127.0.0.1:0", description="host:port of the REST API")
    database_url: str = Field(description="SQLAlchemy URL of the job database, for example sqlite+aiosqlite:///x.db")
    runs_dir: Path = Field(description="each job's folder is made in here")
    state_dir: Path = Field(description="jobs' signing keys are kept in here")
    weights: str = Field(description="address of the weight store")
    supervisor: str = Field(
        description="what runs jobs: a supervisor's address, workers:FOLDER with the sockets of waiting workers, or "
        "kubernetes:FILE with the clusters"
    )
    api_key_file: Path = Field(description="file with the root key: role admin, of every project")
    jobs_since: float = Field(0.0, ge=0, description="Unix seconds; jobs created earlier are left alone")
    oidc_issuer: str | None = Field(None, description="whose OIDC tokens are taken beside API keys; absent: nobody's")
    oidc_audience: str = Field("longshore", description="what those tokens must be for")
    oidc_jwks_url: str | None = Field(None, description="where the issuer publishes its keys; needed with OIDC_ISSUER")
    max_jobs: int | None = Field(None, ge=1, description="jobs that run at a time; absent: no limit")
    max_generators: int | None = Field(None, ge=1, description="generators of all running jobs; absent: no limit")
    max_gpus: int | None = Field(None, ge=0, description="GPUs of all running jobs; absent: no limit")
    data_dir: Path | None = Field(None, description="files below it may be read by jobs of every project")
    audit_days: int = Field(365, ge=1, description="days that the audit log goes back")
    check_memory_mb: int = Field(
        1024, ge=256, description="MiB that the check of one submission may take; two run at a time"
    )
    sites_weights: str = Field("", description="host:port by which rollout sites reach the weight store")
    sites_broker_url: str = Field(
        "", description="rediss://host:port by which rollout sites reach the broker, without name and password"
    )
    sites_gateway: str = Field("", description="URL by which rollout sites reach the REST API, to renew credentials")
    sites_authority: Path | None = Field(
        None, description="folder with ca.crt and ca.key that sign sites' certificates; absent: one in STATE_DIR"
    )
    sites_file: Path | None = Field(
        None, description="list of sites' certificates that are good, for the weight store; absent: one in STATE_DIR"
    )
