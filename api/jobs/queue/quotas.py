"""Quotas: how many more jobs a project may queue, and whether it may run one more.

On PostgreSQL the project's row is locked while its jobs are counted and until the transaction ends, so that
two transactions do not take the same place. On SQLite there is one writer at a time. The lock keeps out
others of its kind, not new jobs that refer to the project.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session, aliased

from api.errors import TooManyRequests
from api.jobs.ledger import repository
from api.jobs.ledger.models import ACTIVE, Job, JobStatus
from api.projects import repository as projects
from api.projects.models import Project
from api.projects.schemas import ProjectUse


def room_in_queue(session: Session, project_id: str, max_queued: int | None) -> int | None:
    """How many more jobs the project may queue in this transaction; None: any number."""
    if max_queued is None:
        return None
    projects.hold_project(session, project_id)
    return max(0, max_queued - repository.count(session, project_id, (JobStatus.QUEUED,)))


def require_room(session: Session, project_id: str, max_queued: int | None) -> None:
    """Make sure that the project may queue one more job in this transaction.

    Raises:
        TooManyRequests: `quota_queued`.
    """
    if room_in_queue(session, project_id, max_queued) == 0:
        raise queue_is_full(max_queued)


def queue_is_full(max_queued: int | None) -> TooManyRequests:
    """The error for a job that the queue has no room for."""
    message = f"All {max_queued} places of the project in the queue are taken."
    return TooManyRequests("quota_queued", message, "Wait until some have started, or cancel some.")


def hold_limited(session: Session, max_running: int | None) -> None:
    """Lock the projects that have a limit, so that claims count their jobs one at a time. max_running: the
    limit of projects without their own."""
    limited = select(Project.id).where(_limit(max_running).is_not(None))
    session.execute(limited.order_by(Project.id).with_for_update(key_share=True))


def full_projects(max_running: int | None) -> Select[str]:
    """Projects that run as many jobs as they may. max_running: the limit of projects without their own.

    A subquery that is not correlated: it is evaluated once for all jobs that wait, and counts no job where no
    project has a limit.
    """
    limit, held = _limit(max_running), aliased(Job)
    running = select(func.count(held.id)).where(held.project_id == Project.id, held.status.in_(ACTIVE))
    return select(Project.id).where(limit.is_not(None), limit <= running.scalar_subquery())


def use(session: Session, project_id: str) -> ProjectUse:
    """What the project uses of its limits."""
    return ProjectUse(
        queued=repository.count(session, project_id, (JobStatus.QUEUED,)),
        running=repository.count(session, project_id, ACTIVE),
    )


def _limit(max_running: int | None) -> ColumnElement[int | None]:
    return func.coalesce(Project.max_running, max_running)
