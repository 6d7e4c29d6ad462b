"""Run by Alembic: connects, and migrates in one transaction, while other processes that want to wait."""

from __future__ import annotations

from alembic import context

import api.jobs.ledger.models
import api.jobs.queue.workers
import api.projects.models
import api.webhooks.models
from api.database import Base, for_writing, make_engine

# Importing these fills Base.metadata.
_TABLES = (
    api.jobs.ledger.models,
    api.jobs.queue.workers,
    api.projects.models,
    api.webhooks.models,
)

_LOCK = 0x6269746D696C6C  # "bitmill": a number that nobody else uses

# SQLite's reflection cannot see that a column of ix_jobs_claim is descending; a test looks at its SQL
# instead. ix_jobs_labels is of PostgreSQL alone.
_NOT_COMPARED = {"sqlite": {"ix_jobs_claim", "ix_jobs_labels"}}


def _comparable(_item: object, name: str | None, kind: str, *_rest: object) -> bool:
    return kind != "index" or name not in _NOT_COMPARED.get(_engine.dialect.name, ())


_engine = make_engine(context.config.attributes["database_url"])
with for_writing(_engine).begin() as _connection:
    if _connection.dialect.name == "postgresql":  # on SQLite a writer is alone anyhow
        _connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    context.configure(
        connection=_connection,
        target_metadata=Base.metadata,
        include_object=_comparable,
        render_as_batch=True,
    )
    context.run_migrations()
_engine.dispose()
