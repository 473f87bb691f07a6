"""The gateway's tables, as the newest migration leaves them; a test holds the two together.

Times are Unix seconds. Names and ids are text of bounded length; what is JSON is never searched in.
"""

from __future__ import annotations

from sqlalchemy import JSON, Float, ForeignKey, Index, MetaData, String, Text
from sqlalchemy.schema import Column, Table
from sqlalchemy.types import BigInteger, Integer

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("error", Text, nullable=False, default=""),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("progress", JSON, nullable=False),
    # Id of the newest broker event that was stored.
    Column("cursor", String(64), nullable=False),
    # One more with every change of the row: what an ETag is made of.
    Column("revision", Integer, nullable=False, server_default="1"),
    # Since when it waits for a place; a resumed job waits anew.
    Column("queued_at", Float, nullable=False, server_default="0"),
    # What it takes of its project's quotas while it has a place.
    Column("generators", Integer, nullable=False, server_default="1"),
    Column("gpus", Integer, nullable=False, server_default="0"),
    # The job and policy version that it was forked from.
    Column("parent_job", String(64)),
    Column("parent_version", BigInteger),
    # What its submission was called by whoever sent it, and the SHA-256 of what was sent.
    Column("idempotency_key", String(128)),
    Column("request_sha256", String(64)),
    # Every listing is one range of one of these, whatever it filters by.
    Index("jobs_by_time", "created_at", "id"),
    Index("jobs_by_state", "state", "created_at", "id"),
    Index("jobs_by_project", "project", "created_at", "id"),
    Index("jobs_by_project_state", "project", "state", "created_at", "id"),
    Index("jobs_by_idempotency_key", "project", "idempotency_key", unique=True),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("job", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("time", Float, nullable=False),
    Column("type", String(32), nullable=False),
    Column("body", JSON, nullable=False),
    Index("job_events_by_job", "job", "id"),
    Index("job_events_by_type", "job", "type", "id"),
    # Ids are never used twice, even after the newest were deleted: they are the stream's Last-Event-ID.
    sqlite_autoincrement=True,
)

# A project without a row has no limits of its own.
projects = Table(
    "projects",
    metadata,
    Column("name", String(64), primary_key=True),
    # Of the jobs that have a place at a time; null: as many as there is room for.
    Column("max_jobs", Integer),
    Column("max_generators", Integer),
    Column("max_gpus", Integer),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    # Null: every project.
    Column("project", String(64)),
    Column("role", String(16), nullable=False),
    Column("name", String(128), nullable=False),
    # SHA-256 of the key as it is sent; the key itself is nowhere.
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    # The key that this one took the place of.
    Column("successor_of", String(32)),
    Index("api_keys_by_project", "project", "id"),
)

# Certificates of rollout sites; a site that renews has several that are good for a while.
site_certificates = Table(
    "site_certificates",
    metadata,
    # Serial number, 40 hex digits.
    Column("serial", String(40), primary_key=True),
    Column("site", String(64), nullable=False),
    # Null: every project.
    Column("project", String(64)),
    # SHA-256 of the site's password at the broker; the password itself is nowhere.
    Column("broker_sha256", String(64), nullable=False),
    # The API key that renews it.
    Column("key_id", String(32), nullable=False),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked_at", Float),
    Index("site_certificates_by_site", "site", "issued_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    # Null: what was asked for belongs to no project, or to one that is not known.
    Column("project", String(64)),
    # Id of the key, or who a token says it is.
    Column("principal", String(128), nullable=False),
    Column("method", String(8), nullable=False),
    Column("path", String(512), nullable=False),
    Column("status", Integer, nullable=False),
    Column("request_id", String(64), nullable=False),
    Index("audit_by_project", "project", "id"),
    sqlite_autoincrement=True,
)
