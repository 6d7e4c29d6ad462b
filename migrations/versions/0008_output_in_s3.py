"""Where in S3 projects read and write, and where a job's files are copied to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_JSONB = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_PREFIXES = ("s3_prefixes", "output_prefixes")


def upgrade() -> None:
    for name in _PREFIXES:
        op.add_column("projects", sa.Column(name, _JSONB))
    op.add_column("jobs", sa.Column("output", sa.Text))


def downgrade() -> None:
    op.drop_column("jobs", "output")
    for name in _PREFIXES:
        op.drop_column("projects", name)
