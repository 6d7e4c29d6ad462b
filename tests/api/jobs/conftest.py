"""What the tests of jobs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from api import database as clock
from api.database import Database
from api.projects.models import Project
from tests.support.jobs import new_job, new_plan


@pytest.fixture
def add_job(database: Database) -> Callable[..., str]:
    """Adds a queued job and returns its id; keywords change its columns."""
    with database.write() as session:
        session.add_all([Project(id="p", name="p", created_at=clock.now(session)), new_plan()])

    def add(id: str = "job", **columns: Any) -> str:
        with database.write() as session:
            session.add(new_job(id, clock.now(session), **columns))
        return id

    return add
