"""Limits of a project, set as an operator sets them."""

from __future__ import annotations

from api.database import Database
from api.projects.schemas import LimitsUpdate
from api.projects.service import set_limits


def limit(database: Database, project: str = "default", **limits: int | None) -> None:
    with database.write() as session:
        set_limits(session, project, LimitsUpdate.model_validate(limits))
