"""Limits of projects; keys that expire and say when they were used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_LIMITS = ("max_queued", "max_running", "max_body_bytes", "requests_per_minute")
_TIMES = ("last_used_at", "expires_at")


def upgrade() -> None:
    for name in _LIMITS:
        op.add_column("projects", sa.Column(name, sa.Integer))
    for name in _TIMES:
        op.add_column("api_keys", sa.Column(name, sa.DateTime(timezone=True)))


def downgrade() -> None:
    for name in _TIMES:
        op.drop_column("api_keys", name)
    for name in _LIMITS:
        op.drop_column("projects", name)
