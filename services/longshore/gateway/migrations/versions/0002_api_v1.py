"""What REST API v1 needs: idempotency, lineage, quotas, API keys, the audit log, and an index for every listing.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    for column in (
        sa.Column("revision", sa.Integer, nullable=False, server_default="1"),
        sa.Column("queued_at", sa.Float, nullable=False, server_default="0"),
        sa.Column("generators", sa.Integer, nullable=False, server_default="1"),
        sa.Column("gpus", sa.Integer, nullable=False, server_default="0"),
        sa.Column("parent_job", sa.String(64)),
        sa.Column("parent_version", sa.BigInteger),
        sa.Column("idempotency_key", sa.String(128)),
        sa.Column("request_sha256", sa.String(64)),
    ):
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET queued_at = created_at")
    op.drop_index("ix_jobs_state", "jobs")
    op.create_index("jobs_by_time", "jobs", ["created_at", "id"])
    op.create_index("jobs_by_state", "jobs", ["state", "created_at", "id"])
    op.create_index("jobs_by_project", "jobs", ["project", "created_at", "id"])
    op.create_index("jobs_by_project_state", "jobs", ["project", "state", "created_at", "id"])
    op.create_index("jobs_by_idempotency_key", "jobs", ["project", "idempotency_key"], unique=True)
    _make_tenants()


def _make_tenants() -> None:
    op.create_table(
        "projects",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("max_jobs", sa.Integer),
        sa.Column("max_generators", sa.Integer),
        sa.Column("max_gpus", sa.Integer),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("project", sa.String(64)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("revoked_at", sa.Float),
        sa.Column("successor_of", sa.String(32)),
    )
    op.create_index("api_keys_by_project", "api_keys", ["project", "id"])
    op.create_table(
        "audit",
        sa.Column("id", _ID, primary_key=True, autoincrement=True),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("project", sa.String(64)),
        sa.Column("principal", sa.String(128), nullable=False),
        sa.Column("method", sa.String(8), nullable=False),
        sa.Column("path", sa.String(512), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_by_project", "audit", ["project", "id"])
