"""Very many submissions at the same moment: all are accepted, and nobody else has to wait for them."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from sqlalchemy import func, select

from api.jobs.ledger.models import Job
from tests.api.conftest import Server
from tests.support.serving import server_process
from tests.support.submitters import submit_at_once

SUBMITTERS = 200  # five times as many as the server has threads
SECONDS = 2.0
"""Any other call is answered within that time."""


def test_submitters_at_once_are_all_accepted(server: Server) -> None:
    """Half of them ask for the same work, so that each looks for what the others do."""
    job = server.submit(cache="bypass")
    bodies: list[dict[str, Any]] = [
        server.body(priority=n % 100, scheme="W4A16" if n % 2 else "W8A8") for n in range(SUBMITTERS)
    ]
    others = [f"/v1/jobs/{job['id']}", "/v1/jobs", "/livez", "/readyz"]
    key = server.http.headers["Authorization"].removeprefix("Bearer ")
    with server_process(server.settings) as url:
        seen = submit_at_once(url, key, bodies, others)
    assert seen.statuses == {202: SUBMITTERS}
    assert {status for path in others for status, _ in seen.others[path]} == {200}
    assert {path: seen.slowest(path) for path in others if seen.slowest(path) > SECONDS} == {}
    with server.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == SUBMITTERS + 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_broker_that_hangs_keeps_nobody_waiting(server: Server) -> None:
    """Each wake-up waits two seconds for it. They are sent after the answers."""
    job = server.submit(cache="bypass")
    key = server.http.headers["Authorization"].removeprefix("Bearer ")
    others = [f"/v1/jobs/{job['id']}", "/livez"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        broker_url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with server_process(server.settings.model_copy(update={"broker_url": broker_url})) as url:
            for _ in range(2):
                seen = submit_at_once(url, key, [server.body(cache="bypass")] * 60, others)
                assert seen.statuses == {202: 60}
                assert {path: seen.slowest(path) for path in others if seen.slowest(path) > SECONDS} == {}
