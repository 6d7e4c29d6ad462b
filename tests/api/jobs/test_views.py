"""How a job is shown."""

from __future__ import annotations

from typing import Any

import pytest

from api.jobs.ledger.models import Job
from api.jobs.ledger.repository import SHOWN
from api.jobs.ledger.views import JobRead
from tests.api.conftest import Server


class Row:
    """A row of the database that notes which of its columns are read."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.read = set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._job, name)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_is_shown_by_the_columns_that_are_asked_for(server: Server) -> None:
    job_id = server.submit()["id"]
    with server.database.read() as session:
        job = session.get_one(Job, job_id)
    job.error_code, job.error_message, job.batch_id, job.batch_index = "code", "message", "batch_1", 0
    row: Any = Row(job)
    assert JobRead.of(row).model_dump(mode="json")["id"] == job_id
    assert row.read == set(SHOWN)
