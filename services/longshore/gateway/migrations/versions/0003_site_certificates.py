"""Certificates of rollout sites.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "site_certificates",
        sa.Column("serial", sa.String(40), primary_key=True),
        sa.Column("site", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64)),
        sa.Column("broker_sha256", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("issued_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
    )
    op.create_index("site_certificates_by_site", "site_certificates", ["site", "issued_at"])
