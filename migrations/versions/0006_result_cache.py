"""What was made once is given again: which work a job is, whose result it has, and digests of files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_INDEXES = {
    "ix_jobs_cache": ["project_id", "cache_key"],
    "ix_jobs_twin": ["status", "deduplicated_from"],
    "ix_jobs_manifest": ["manifest_key"],
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("cache", sa.String(8), nullable=False, server_default="use"))
    op.add_column("jobs", sa.Column("cache_key", sa.String(64)))
    op.add_column("jobs", sa.Column("deduplicated_from", sa.String(40)))
    for name, columns in _INDEXES.items():
        there = sa.text(f"{columns[-1]} IS NOT NULL")
        op.create_index(name, "jobs", columns, postgresql_where=there, sqlite_where=there)
    op.create_table(
        "file_digests",
        sa.Column("stamp", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_file_digests_at", "file_digests", ["at"])


def downgrade() -> None:
    op.drop_table("file_digests")
    for name in _INDEXES:
        op.drop_index(name, "jobs")
    for column in ("deduplicated_from", "cache_key", "cache"):
        op.drop_column("jobs", column)
