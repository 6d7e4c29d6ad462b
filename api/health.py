"""/livez and /readyz"""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

import migrations
from api.artifacts.store import StoreUnavailable
from api.codes import documented
from api.dependencies import AppContext, Context
from api.errors import Unavailable

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """`status` is alive or ready."""

    status: str


@router.get("/livez")
def livez() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/readyz", responses=documented({503: ["schema_stale", "store_unavailable"]}))
def readyz(context: Context) -> Health:
    """The database has the schema that this code needs, and the store answers."""
    _check_schema(context)
    _check_store(context)
    return Health(status="ready")


def _check_schema(context: AppContext) -> None:
    current, wanted = migrations.current(context.database.engine), migrations.head()
    if current != wanted:
        message = f"The database's schema is at {current}, this server needs {wanted}."
        raise Unavailable("schema_stale", message, "Run `bitmill db upgrade`.")


def _check_store(context: AppContext) -> None:
    try:
        context.store.probe()
    except StoreUnavailable as error:
        raise Unavailable("store_unavailable", error.message, error.hint) from error
