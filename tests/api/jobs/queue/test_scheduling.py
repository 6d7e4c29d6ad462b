"""What a job says of the workers that do not take it is what `claim` does."""

from __future__ import annotations

from itertools import product

import pytest
from sqlalchemy import update

from api.database import Database, Now
from api.jobs.ledger import repository
from api.jobs.ledger.models import AttemptOutcome, Job
from api.jobs.queue import leases, scheduling, workers
from api.jobs.queue.workers import WorkerIdentity
from tests.api.conftest import Server

GIB = 1 << 30
SMALL, LARGE = 48 * GIB, 96 * GIB
CPUS = [WorkerIdentity("cpu", "cpu", size, 0) for size in (SMALL, LARGE)]
GPUS = [WorkerIdentity("gpu", "cuda", host, gpu) for host, gpu in product((SMALL, LARGE), repeat=2)]


def come(database: Database, *alive: WorkerIdentity) -> None:
    with database.write() as session:
        for worker in alive:
            workers.heartbeat(session, worker)


def need(server: Server, job_id: str, **columns: object) -> None:
    with server.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**columns))


@pytest.mark.parametrize("device_class", ["any", "cpu", "cuda"])
@pytest.mark.parametrize(("host", "gpu"), [(GIB, GIB), (61 * GIB, GIB), (GIB, 61 * GIB)])
@pytest.mark.parametrize(
    "alive", [(), *((cpu,) for cpu in CPUS), *((gpu,) for gpu in GPUS), (CPUS[0], GPUS[1])]
)
def test_a_worker_takes_what_has_no_obstacle(
    server: Server, device_class: str, host: int, gpu: int, alive: tuple[WorkerIdentity, ...]
) -> None:
    job_id = server.submit()["id"]
    need(server, job_id, device_class=device_class, required_host_bytes=host, required_gpu_bytes=gpu)
    come(server.database, *alive)
    with server.database.read() as session:
        project_id = session.get_one(Job, job_id).project_id
        version = repository.version(session, project_id, job_id)
        assert version is not None
        obstacle = scheduling.obstacle(version, [row for row, _ in workers.list_alive(session, 90)])
    taken = False
    for worker in alive:
        with server.database.write() as session:
            taken = taken or leases.claim(session, worker, 90) is not None
    assert taken == (obstacle is None)


def test_the_job_says_it_until_a_worker_comes(server: Server) -> None:
    job_id = server.submit()["id"]
    path = f"/v1/jobs/{job_id}"
    need(server, job_id, required_host_bytes=61 * GIB)
    nobody = server.http.get(path)
    assert nobody.json()["obstacle"] == {"code": "no_worker", "message": "No worker is alive."}
    come(server.database, CPUS[0])
    small = server.http.get(path, headers={"If-None-Match": nobody.headers["ETag"]})
    assert small.json()["obstacle"] == {
        "code": "unschedulable",
        "message": "The job needs 61.0 GiB of host memory; the largest worker has 48.0 GiB.",
    }
    come(server.database, CPUS[1])
    large = server.http.get(path, headers={"If-None-Match": small.headers["ETag"]})
    assert (large.status_code, large.json()["obstacle"]) == (200, None)


def test_a_gpu_that_is_too_small_is_named(server: Server) -> None:
    job_id = server.submit(resources={"device_class": "cuda"})["id"]
    path = f"/v1/jobs/{job_id}"
    come(server.database, CPUS[1])
    assert "device class cuda" in server.http.get(path).json()["obstacle"]["message"]
    need(server, job_id, required_gpu_bytes=61 * GIB)
    come(server.database, GPUS[2])
    assert (
        "61.0 GiB of GPU memory; the largest worker has 48.0"
        in server.http.get(path).json()["obstacle"]["message"]
    )


def test_a_store_that_refuses_is_named_until_it_is_tried_again(server: Server) -> None:
    job_id = server.submit()["id"]
    come(server.database, CPUS[1])
    with server.database.write() as session:
        claimed = leases.claim(session, CPUS[1], 90)
        assert claimed is not None
        leases.postpone(
            session,
            claimed[0],
            AttemptOutcome.STORE_LOST,
            "store_denied",
            "The artifact store refuses: AccessDenied.",
        )
    path = f"/v1/jobs/{job_id}"
    refused = server.http.get(path)
    assert refused.json()["obstacle"]["code"] == "store_denied"
    assert refused.json()["obstacle"]["message"].startswith(
        "The artifact store refuses: AccessDenied. It is tried again at "
    )
    need(server, job_id, available_at=Now())
    again = server.http.get(path, headers={"If-None-Match": refused.headers["ETag"]})
    assert (again.status_code, again.json()["obstacle"]) == (200, None)


def test_a_job_that_runs_has_none(server: Server) -> None:
    job_id = server.submit()["id"]
    with server.database.write() as session:
        assert leases.claim(session, CPUS[1], 90)
    assert server.http.get(f"/v1/jobs/{job_id}").json()["obstacle"] is None
