"""What metrics count, and the span that a job was queued in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String(55)))
    op.create_index("ix_jobs_ended", "jobs", ["status", "finished_at", "device_class"])
    op.create_index("ix_attempts_ended", "attempts", ["ended_at", "outcome"])


def downgrade() -> None:
    op.drop_index("ix_attempts_ended", "attempts")
    op.drop_index("ix_jobs_ended", "jobs")
    op.drop_column("jobs", "traceparent")
