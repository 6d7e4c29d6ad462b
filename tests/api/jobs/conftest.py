"""What the tests of jobs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from api import database as clock
from api.database import Database
from api.jobs.models import Job, JobStatus
from api.projects.models import Project


@pytest.fixture
def add_job(database: Database) -> Callable[..., str]:
    """Adds a queued job and returns its id; keywords change its columns."""
    with database.write() as session:
        session.add(Project(id="p", name="p", created_at=clock.now(session)))

    def add(id: str = "job", **columns: Any) -> str:
        with database.write() as session:
            now = clock.now(session)
            defaults: dict[str, Any] = {
                "project_id": "p",
                "labels": {},
                "priority": 0,
                "model": "m",
                "source": "/m",
                "scheme": "W4A16",
                "method": "rtn",
                "recipe": {},
                "calibration": {},
                "evaluation": {},
                "plan": {},
                "max_attempts": 3,
                "device_class": "any",
                "required_host_bytes": 100,
                "required_gpu_bytes": 100,
                "status": JobStatus.QUEUED,
                "layers_total": 2,
                "created_at": now,
                "available_at": now,
            }
            session.add(Job(id=id, **{**defaults, **columns}))
        return id

    return add
