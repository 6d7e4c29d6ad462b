"""Batches, and keys that make other things than jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_JSONB = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200)),
        sa.Column("labels", _JSONB, nullable=False),
        sa.Column("accepted", sa.Integer, nullable=False),
        sa.Column("refused", sa.Integer, nullable=False),
        sa.Column("refusals", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_batches_project_id_projects"),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_list", "batches", ["project_id", "created_at", "id"])
    key = sa.ForeignKey("batches.id", name="fk_jobs_batch_id_batches")
    op.add_column("jobs", sa.Column("batch_id", sa.String(40), key), inline_references=True)
    op.add_column("jobs", sa.Column("batch_index", sa.Integer))
    op.create_index("ix_jobs_batch", "jobs", ["batch_id", "batch_index", "status", "deleted_at", "id"])
    op.execute("ALTER TABLE idempotency_keys RENAME COLUMN job_id TO resource_id")


def downgrade() -> None:
    op.execute("DELETE FROM idempotency_keys WHERE resource_id NOT LIKE 'job%'")
    op.execute("ALTER TABLE idempotency_keys RENAME COLUMN resource_id TO job_id")
    op.drop_index("ix_jobs_batch", "jobs")
    op.drop_column("jobs", "batch_index")
    op.drop_column("jobs", "batch_id")
    op.drop_table("batches")
