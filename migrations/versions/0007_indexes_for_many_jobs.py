"""Indexes that lists, sweeps and retention need when there are many jobs; none of them holds lease_until."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_CLAIM = ("status", sa.text("priority DESC"), "created_at", "id")
_COUNTED = ("device_class", "available_at", "project_id", "deduplicated_from")
_DELETED = sa.text("deleted_at IS NOT NULL")
_WAITS_FOR_SO_LONG = sa.text("queue_deadline IS NOT NULL")


def upgrade() -> None:
    op.drop_index("ix_jobs_lease", "jobs")
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index("ix_jobs_claim", "jobs", [*_CLAIM, *_COUNTED])
    op.create_index(
        "ix_jobs_deadline",
        "jobs",
        ["status", "queue_deadline"],
        postgresql_where=_WAITS_FOR_SO_LONG,
        sqlite_where=_WAITS_FOR_SO_LONG,
    )
    op.create_index("ix_jobs_list_model", "jobs", ["project_id", "model", "created_at", "id"])
    if op.get_bind().dialect.name == "postgresql":
        op.create_index(
            "ix_jobs_labels",
            "jobs",
            ["labels"],
            postgresql_using="gin",
            postgresql_ops={"labels": "jsonb_path_ops"},
            postgresql_with={"fastupdate": "off"},
        )
    op.drop_index("ix_jobs_deleted_at", "jobs")
    op.create_index(
        "ix_jobs_deleted_at", "jobs", ["deleted_at"], postgresql_where=_DELETED, sqlite_where=_DELETED
    )
    op.create_index("ix_job_layers_at", "job_layers", ["at"])
    op.create_index("ix_webhook_deliveries_created_at", "webhook_deliveries", ["created_at"])
    op.create_index("ix_idempotency_keys_resource_id", "idempotency_keys", ["resource_id"])


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys_resource_id", "idempotency_keys")
    op.drop_index("ix_webhook_deliveries_created_at", "webhook_deliveries")
    op.drop_index("ix_job_layers_at", "job_layers")
    op.drop_index("ix_jobs_deleted_at", "jobs")
    op.create_index("ix_jobs_deleted_at", "jobs", ["deleted_at"])
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_jobs_labels", "jobs")
    op.drop_index("ix_jobs_list_model", "jobs")
    op.drop_index("ix_jobs_deadline", "jobs")
    op.drop_index("ix_jobs_claim", "jobs")
    op.create_index("ix_jobs_claim", "jobs", [*_CLAIM])
    op.create_index("ix_jobs_lease", "jobs", ["status", "lease_until"])
