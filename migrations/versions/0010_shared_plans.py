"""Plans of their own: jobs that were decided alike share one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_JSONB = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_AT_ONCE = 500
_jobs = sa.table("jobs", sa.column("id"), sa.column("plan", _JSONB), sa.column("plan_id"))
_plans = sa.table("plans", sa.column("id"), sa.column("document", sa.Text))


def upgrade() -> None:
    op.create_table(
        "plans",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("document", sa.Text, nullable=False),
    )
    # May be null, since SQLite takes no new column that refers to a table and may not. No row is.
    key = sa.ForeignKey("plans.id", name="fk_jobs_plan_id_plans")
    op.add_column("jobs", sa.Column("plan_id", sa.String(64), key), inline_references=True)
    _share()
    op.create_index("ix_jobs_plan_id", "jobs", ["plan_id"])
    op.drop_column("jobs", "plan")


def downgrade() -> None:
    op.add_column("jobs", sa.Column("plan", _JSONB, nullable=False, server_default="{}"))
    document = sa.select(_plans.c.document).where(_plans.c.id == _jobs.c.plan_id).scalar_subquery()
    kind = postgresql.JSONB() if op.get_bind().dialect.name == "postgresql" else sa.Text()
    op.execute(_jobs.update().values(plan=sa.cast(document, kind)))
    op.drop_index("ix_jobs_plan_id", "jobs")
    op.drop_column("jobs", "plan_id")
    op.drop_table("plans")


def _share() -> None:
    connection, kept, last = op.get_bind(), set[str](), ""
    page = sa.select(_jobs.c.id, _jobs.c.plan).order_by(_jobs.c.id).limit(_AT_ONCE)
    while rows := connection.execute(page.where(_jobs.c.id > last)).all():
        last = rows[-1].id
        plans = {job_id: _text(plan) for job_id, plan in rows}
        names = {job_id: hashlib.sha256(plan.encode()).hexdigest() for job_id, plan in plans.items()}
        new = {names[job_id]: plan for job_id, plan in plans.items() if names[job_id] not in kept}
        if new:
            connection.execute(_plans.insert(), [{"id": name, "document": new[name]} for name in new])
            kept |= new.keys()
        naming = _jobs.update().where(_jobs.c.id == sa.bindparam("job"))
        connection.execute(
            naming.values(plan_id=sa.bindparam("name")),
            [{"job": job_id, "name": name} for job_id, name in names.items()],
        )


def _text(plan: dict[str, Any]) -> str:
    """As it is kept: without the seed."""
    if plan.get("calibration") is not None:
        plan["calibration"].pop("seed", None)
    return json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
