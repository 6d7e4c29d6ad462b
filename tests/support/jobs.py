"""The row of a job, and very many like it, made inside the database in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from api.jobs.ledger.models import Job, JobStatus, StoredPlan

TEAMS, MODELS, PLANS = 50, 500, 2000
"""Labels `team:t0` to `team:t49` and as many models and plans are shared out evenly; `run:<number>` is of one
job."""
PLAN_ID = "0" * 64
_BASE = 10**9


@dataclass(frozen=True)
class _Dialect:
    """How a database says it. numbers: a query of `i` from 1; moment: a time, so many seconds into 2026."""

    numbers: str
    moment: str
    json: str


_DIALECTS = {
    "postgresql": _Dialect(
        numbers="SELECT generate_series(1, {}) AS i",
        moment="CAST('2026-01-01T00:00:00Z' AS timestamptz) + ({}) * interval '1 second'",
        json="CAST({} AS jsonb)",
    ),
    "sqlite": _Dialect(
        numbers="WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {})"
        " SELECT i FROM n",
        moment="strftime('%Y-%m-%d %H:%M:%S', '2026-01-01', ({}) || ' seconds') || '.000000'",
        json="{}",
    ),
}


def new_plan() -> StoredPlan:
    """The plan of all that `new_job` makes."""
    return StoredPlan(id=PLAN_ID, document="{}")


def new_job(id: str, now: datetime, **columns: Any) -> Job:
    """The row of a queued job of project `p` with the plan of `new_plan`; keywords change its columns."""
    defaults: dict[str, Any] = {
        "project_id": "p",
        "labels": {},
        "priority": 0,
        "model": "m",
        "source": "/m",
        "scheme": "W4A16",
        "method": "rtn",
        "recipe": {},
        "calibration": {},
        "evaluation": {},
        "plan_id": PLAN_ID,
        "max_attempts": 3,
        "device_class": "any",
        "required_host_bytes": 100,
        "required_gpu_bytes": 100,
        "status": JobStatus.QUEUED,
        "layers_total": 2,
        "created_at": now,
        "available_at": now,
    }
    return Job(id=id, **defaults | columns)


def job_id(number: int) -> str:
    """The id of a copy; the first is 1."""
    return f"job_{_BASE + number}"


def multiply(session: Session, original_id: str, count: int, *, events_each: int = 5) -> None:
    """Add copies of a job, submitted a second after one another from the beginning of 2026, and let the
    database's planner know. Of a hundred 90 succeeded, seven failed, two wait, and one runs.

    Each has its first events, and an attempt unless it waits. Plans are the original's, as many times.
    """
    name = session.get_bind().dialect.name
    dialect = _DIALECTS[name]
    at = dialect.moment.format("i")
    ended, waits = "i % 100 < 97", "i % 100 IN (97, 98)"
    label = """'{"team": "t' || (i % teams) || '", "run": "' || i || '"}'""".replace("teams", str(TEAMS))
    values = {
        "id": f"'job_' || ({_BASE} + i)",
        "model": f"'/models/' || (i % {MODELS})",
        "labels": dialect.json.format(label),
        "plan_id": f"'plan_' || (1 + i % {PLANS})",
        "status": "CASE WHEN i % 100 < 90 THEN 'succeeded' WHEN i % 100 < 97 THEN 'failed'"
        " WHEN i % 100 < 99 THEN 'queued' ELSE 'running' END",
        "event_seq": str(events_each),
        "attempts_made": f"CASE WHEN {waits} THEN 0 ELSE 1 END",
        "created_at": at,
        "available_at": at,
        "started_at": f"CASE WHEN {waits} THEN NULL ELSE {at} END",
        "finished_at": f"CASE WHEN {ended} THEN {at} END",
        "lease_token": "1",
        "lease_until": f"CASE WHEN i % 100 = 99 THEN {dialect.moment.format(_BASE)} END",
    }
    columns = [column.name for column in Job.__table__.columns]
    picked = ", ".join(values.get(column, f"original.{column}") for column in columns)
    copies = f"jobs WHERE id BETWEEN '{job_id(1)}' AND '{job_id(count)}'"
    if name == "postgresql":  # what the rows refer to is there: it is not looked up for each
        session.execute(text("SET LOCAL session_replication_role = replica"))
    session.execute(
        text(
            "INSERT INTO plans (id, document) SELECT 'plan_' || i, document"
            f" FROM plans, ({dialect.numbers.format(PLANS)}) AS n WHERE id = :original"
        ),
        {"original": session.get_one(Job, original_id).plan_id},
    )
    session.execute(
        text(
            f"INSERT INTO jobs ({', '.join(columns)}) SELECT {picked}"
            f" FROM jobs AS original, ({dialect.numbers.format(count)}) AS n WHERE original.id = :original"
        ),
        {"original": original_id},
    )
    for statement in (
        "INSERT INTO attempts (job_id, number, token, worker_id, device_class, started_at, outcome)"
        " SELECT id, 1, 1, 'worker-1', 'cpu', started_at, CASE WHEN status <> 'running' THEN status END"
        f" FROM {copies} AND started_at IS NOT NULL",
        "INSERT INTO job_events (job_id, seq, at, attempt, type, data)"
        f" SELECT id, i, created_at, 1, 'layer_solved', {dialect.json.format(_EVENT)}"
        f" FROM ({dialect.numbers.format(events_each)}) AS n, {copies}",
        "ANALYZE",
    ):
        session.execute(text(statement))


_EVENT = """'{"layer": 0, "layers_total": 2, "relative_error": 0.01, "seconds": 1.5, "eta_seconds": 1.5}'"""
