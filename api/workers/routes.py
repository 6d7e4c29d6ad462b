"""/v1/workers"""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import CurrentSettings, Reader, ReadSession
from api.errors import documented
from api.workers import service
from api.workers.schemas import WorkerList

router = APIRouter(prefix="/v1/workers", tags=["workers"], responses=documented(401, 403, 503))


@router.get("", response_model=WorkerList)
def list_workers(caller: Reader, session: ReadSession, settings: CurrentSettings) -> WorkerList:
    """The workers that are alive, their device and memory, and what they run."""
    return service.list_workers(session, caller.project_id, lease_seconds=settings.lease_seconds)
