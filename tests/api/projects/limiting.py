"""Limits and prefixes of a project, set as an operator sets them."""

from __future__ import annotations

from api.database import Database
from api.projects.schemas import ProjectUpdate
from api.projects.service import update


def limit(database: Database, project: str = "default", **limits: int | list[str] | None) -> None:
    with database.write() as session:
        update(session, project, ProjectUpdate.model_validate(limits))
