"""/v1/project and /v1/keys"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.http.codes import EVERYWHERE, WITH_BODY, documented
from api.http.dependencies import Admin, Context, Reader
from api.jobs.queue import quotas
from api.projects import repository, service
from api.projects.schemas import KeyCreate, KeyCreated, KeyPage, ProjectRead

router = APIRouter(prefix="/v1", tags=["projects"], responses=documented(EVERYWHERE))


@router.get("/project", response_model=ProjectRead)
def get_project(caller: Reader, context: Context) -> ProjectRead:
    """The project of the key that calls: its limits, and what of them is used."""
    with context.database.read() as session:
        project = repository.get_project(session, caller.project_id)
        return service.describe(project, context.settings, quotas.use(session, project.id))


@router.post(
    "/keys",
    status_code=201,
    response_model=KeyCreated,
    responses=documented(WITH_BODY, {422: ["already_expired"]}),
)
def create_key(body: KeyCreate, caller: Admin, context: Context) -> KeyCreated:
    """Make a key for the own project. It is shown in this answer only."""
    with context.database.write() as session:
        return service.create_key(session, context.hasher, caller.project_id, body)


@router.get("/keys", response_model=KeyPage, responses=documented({422: ["bad_cursor"]}))
def list_keys(
    caller: Admin,
    context: Context,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> KeyPage:
    """List the project's keys a page at a time, the newest first. The keys themselves are kept nowhere."""
    with context.database.read() as session:
        return service.list_keys(session, caller.project_id, cursor, limit)


@router.delete(
    "/keys/{key_id}",
    status_code=204,
    responses=documented({404: ["key_not_found"], 409: ["last_admin_key"]}),
)
def revoke_key(key_id: str, caller: Admin, context: Context) -> None:
    """Revoke a key: from then on it is refused. The project's last key for `admin` cannot be revoked."""
    with context.database.write() as session:
        service.revoke_own_key(session, caller.project_id, key_id)
