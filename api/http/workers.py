"""/v1/workers and /v1/queues"""

from __future__ import annotations

from fastapi import APIRouter

from api.http.codes import EVERYWHERE, documented
from api.http.dependencies import Context, Reader
from api.workers import service
from api.workers.schemas import QueueList, WorkerList

router = APIRouter(prefix="/v1", tags=["workers"], responses=documented(EVERYWHERE))


@router.get("/workers", response_model=WorkerList)
def list_workers(caller: Reader, context: Context) -> WorkerList:
    """The workers that are alive, their device and memory, and what they run."""
    with context.database.read() as session:
        return service.list_workers(session, caller.project_id, lease_seconds=context.settings.lease_seconds)


@router.get("/queues", response_model=QueueList)
def list_queues(_: Reader, context: Context) -> QueueList:
    """How many jobs wait and run, and the workers that could take them, by device class."""
    with context.database.read() as session:
        return service.list_queues(session, lease_seconds=context.settings.lease_seconds)
