"""/livez and /readyz"""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from api.errors import Unavailable
from api.http.codes import documented
from api.http.dependencies import Context
from api.readiness import Check
from api.schemas import all_required
from compression.errors import Problem

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """`status` is alive."""

    model_config = ConfigDict(json_schema_extra=all_required)

    status: str = "alive"


class Ready(BaseModel):
    """`status` is ready. Only checks without which this server could not work keep it from being so."""

    model_config = ConfigDict(json_schema_extra=all_required)

    status: str = "ready"
    checks: list[Check]


@router.get("/livez")
async def livez() -> Alive:
    """The process answers."""
    return Alive()


@router.get(
    "/readyz",
    responses=documented(
        {503: ["database_unavailable", "schema_stale", "schema_newer", "store_unavailable"]}
    ),
)
async def readyz(context: Context) -> Ready:
    """The database has the schema that this code needs, and the store answers. A broker that is away is a
    warning: jobs are accepted without it. The errors of a 503 are the checks that failed."""
    checks = await context.readiness.examine()
    failed = [Problem(check.code, check.message, check.hint) for check in checks if check.status == "failed"]
    if failed:
        first = failed[0]
        raise Unavailable(first.code, first.message, first.hint, problems=failed)
    return Ready(checks=checks)
