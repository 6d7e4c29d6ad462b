"""Projects, keys, workers, jobs with attempts, events and layers, idempotency keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    _create_projects()
    _create_workers()
    _create_jobs()
    _create_job_details()
    _create_idempotency_keys()


def downgrade() -> None:
    for table in (
        "idempotency_keys",
        "job_layers",
        "job_events",
        "attempts",
        "jobs",
        "workers",
        "api_keys",
        "projects",
    ):
        op.drop_table(table)


def _create_projects() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("name", name="uq_projects_name"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", _JSON, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("revoked_at", _TIME),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_api_keys_project_id_projects", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])


def _create_workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.String(200), nullable=False),
        sa.Column("device_class", sa.String(8), nullable=False),
        sa.Column("host_bytes", sa.BigInteger, nullable=False),
        sa.Column("gpu_bytes", sa.BigInteger, nullable=False),
        sa.Column("job_id", sa.String(40)),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("heartbeat_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(200)),
        sa.Column("labels", _JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("dataset_label", sa.Text),
        sa.Column("scheme", sa.String(120), nullable=False),
        sa.Column("method", sa.String(120), nullable=False),
        sa.Column("recipe", _JSON, nullable=False),
        sa.Column("dataset", _JSON),
        sa.Column("calibration", _JSON, nullable=False),
        sa.Column("evaluation", _JSON, nullable=False),
        sa.Column("quality_gate", _JSON),
        sa.Column("max_runtime_seconds", sa.Integer),
        sa.Column("max_queue_seconds", sa.Integer),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("plan", _JSON, nullable=False),
        sa.Column("device_class", sa.String(8), nullable=False),
        sa.Column("required_host_bytes", sa.BigInteger, nullable=False),
        sa.Column("required_gpu_bytes", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("phase", sa.String(16)),
        sa.Column("layers_done", sa.Integer, nullable=False),
        sa.Column("layers_total", sa.Integer, nullable=False),
        sa.Column("event_seq", sa.Integer, nullable=False),
        sa.Column("attempts_made", sa.Integer, nullable=False),
        sa.Column("attempts_counted", sa.Integer, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("available_at", _TIME, nullable=False),
        sa.Column("queue_deadline", _TIME),
        sa.Column("started_at", _TIME),
        sa.Column("finished_at", _TIME),
        sa.Column("lease_owner", sa.String(200)),
        sa.Column("lease_token", sa.BigInteger, nullable=False),
        sa.Column("lease_until", _TIME),
        sa.Column("work_key", sa.String(64)),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("resolved_plan", _JSON),
        sa.Column("report", _JSON),
        sa.Column("manifest_key", sa.Text),
        sa.Column("error_code", sa.String(80)),
        sa.Column("error_message", sa.Text),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_jobs_project_id_projects"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_claim", "jobs", ["status", sa.text("priority DESC"), "created_at", "id"])
    op.create_index("ix_jobs_lease", "jobs", ["status", "lease_until"])
    op.create_index("ix_jobs_list", "jobs", ["project_id", "created_at", "id"])
    op.create_index("ix_jobs_list_status", "jobs", ["project_id", "status", "created_at", "id"])


def _job_key(table: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_job_id_jobs"
    return sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=name, ondelete="CASCADE")


def _create_job_details() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("worker_id", sa.String(200), nullable=False),
        sa.Column("device_class", sa.String(8), nullable=False),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("ended_at", _TIME),
        sa.Column("seconds", sa.Double),
        sa.Column("outcome", sa.String(16)),
        sa.Column("error_code", sa.String(80)),
        sa.Column("error_message", sa.Text),
        sa.Column("exit_signal", sa.Integer),
        sa.Column("peak_host_bytes", sa.BigInteger),
        sa.Column("peak_gpu_bytes", sa.BigInteger),
        _job_key("attempts"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_attempts"),
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("attempt", sa.Integer),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("data", _JSON, nullable=False),
        _job_key("job_events"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_events"),
    )
    op.create_table(
        "job_layers",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("work_key", sa.String(64), nullable=False),
        sa.Column("layer", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("store_key", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("entry", _JSON, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        _job_key("job_layers"),
        sa.PrimaryKeyConstraint("job_id", "work_key", "layer", name="pk_job_layers"),
    )


def _create_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("route", sa.String(80), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
            name="fk_idempotency_keys_project_id_projects",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("project_id", "route", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
