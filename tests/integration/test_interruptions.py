"""A worker that is stopped, a cancel in every phase, a worker that comes back after its lease.

All on machines that share nothing on their disks, and whose clocks are minutes apart."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import psycopg
import pytest

from tests.integration.cluster import LAYERS, Cluster, running_cluster
from tests.integration.service import Process, eventually
from tests.support.postgres import PostgresServer
from tests.support.receiver import Receiver
from tests.support.s3 import S3Server

Start = Callable[..., Process]
Record = Callable[[str, object], None]
CANCEL_SECONDS = 5
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, s3: S3Server, postgres: PostgresServer
) -> Iterator[tuple[Cluster, Receiver]]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), s3, postgres) as running:
        yield running


@pytest.fixture
def cluster(running: tuple[Cluster, Receiver]) -> Cluster:
    return running[0]


@pytest.fixture
def receiver(running: tuple[Cluster, Receiver]) -> Receiver:
    return running[1]


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Start]:
    """Starts a machine that ends with the test."""
    started: list[Process] = []

    def machine(name: str, *, ahead: int) -> Process:
        started.append(cluster.machine(name, ahead=ahead))
        return started[-1]

    yield machine
    for process in started:
        process.end()
        sys.stderr.write(process.log.read_text()[-5000:])  # pytest shows it where the test failed


def was_there(cluster: Cluster, worker: Process, seconds: float) -> bool:
    """Whether a worker has been there for so long, and has looked for lost leases meanwhile."""
    rows = [row for row in cluster.client.workers()["items"] if f"-{worker.pid}-" in row["id"]]
    times = [[datetime.fromisoformat(row[f"{name}_at"]) for name in ("heartbeat", "started")] for row in rows]
    return any((last - first).total_seconds() > seconds for last, first in times)


def counted(cluster: Cluster, job_id: str) -> int:
    """How many attempts count towards max_attempts."""
    with psycopg.connect(cluster.settings["DATABASE_URL"]) as connection:
        query = "SELECT attempts_counted FROM jobs WHERE id = %s"
        row = connection.execute(query, (job_id,)).fetchone()
    assert row is not None
    return int(row[0])


def assert_published(cluster: Cluster, job_id: str) -> None:
    """The files are whole, and there are none but those of one attempt, in the store and in the copy."""
    files = cluster.download(job_id)
    folder = (cluster.client.artifacts(job_id)["output"] or "").removeprefix("s3://store/")
    copies = {
        name: cluster.s3.client.get_object(Bucket="store", Key=f"{folder}/{name}")["Body"].read()
        for name in cluster.objects(folder)
    }
    manifest = json.loads(copies.pop("manifest.json"))
    assert {file["name"]: file["sha256"] for file in manifest["files"]} == files
    assert {name: hashlib.sha256(content).hexdigest() for name, content in copies.items()} == files
    assert cluster.attempts_with_files(job_id) == {folder.rpartition("/")[2]}


def test_a_stopped_worker_gives_its_job_to_one_with_empty_disks(
    cluster: Cluster, receiver: Receiver, start: Start, record_property: Record
) -> None:
    first = start("first", ahead=-120)
    job_id = cluster.submit(**cluster.body, max_queue_seconds=100)
    cluster.wait_for_layers(job_id, 3)
    os.kill(cluster.engine(), signal.SIGSTOP)
    second = start("second", ahead=120)
    eventually(lambda: was_there(cluster, second, 2), 30, "the second worker gives no sign")
    assert cluster.outcomes(job_id) == [None]  # by a clock that is ahead the lease would have run out

    stopped = time.monotonic()
    first.signal(signal.SIGTERM)
    eventually(lambda: cluster.outcomes(job_id)[0] == "preempted", 30, "the job was not given back")
    record_property("given back after seconds", time.monotonic() - stopped)
    assert first.wait() == 0
    shutil.rmtree(cluster.data / "first")

    cluster.succeed(job_id)
    assert cluster.outcomes(job_id) == ["preempted", "succeeded"]
    assert counted(cluster, job_id) == 0
    finished = cluster.layers(job_id, "layer_solved", 1)
    assert len(finished) >= 3
    assert cluster.layers(job_id, "layer_replayed", 2) == finished
    assert finished + cluster.layers(job_id, "layer_solved", 2) == list(range(LAYERS))
    assert_published(cluster, job_id)

    eventually(lambda: bool(receiver.received), 10, "nobody told that the job succeeded")
    told = receiver.received[-1]
    assert json.loads(told.body)["data"]["job"]["id"] == job_id
    assert abs(int(told.headers["webhook-timestamp"]) - time.time()) < 60


def test_a_worker_that_comes_back_after_its_lease_changes_nothing(cluster: Cluster, start: Start) -> None:
    zombie = start("zombie", ahead=120)
    job_id = cluster.submit(**cluster.body)
    engine = cluster.hold_at_verify(job_id)
    cluster.gate.rate = 20_000
    os.kill(engine, signal.SIGCONT)
    eventually(lambda: bool(cluster.attempts_with_files(job_id)), 30, "nothing is uploaded")
    zombie.signal(signal.SIGSTOP)
    cluster.gate.rate = None
    start("heir", ahead=-120)
    cluster.succeed(job_id)
    before = cluster.events(job_id)

    zombie.signal(signal.SIGCONT)
    assert zombie.stop() == 0
    assert cluster.events(job_id) == before
    assert cluster.outcomes(job_id) == ["lease_lost", "succeeded"]
    assert cluster.layers(job_id, "layer_solved", 2) == []
    assert_published(cluster, job_id)


class Held:
    """A job at a place where it would stay, by name of the phase."""

    def __init__(self, cluster: Cluster, job_id: str, start: Start) -> None:
        self._cluster = cluster
        self._job_id = job_id
        self._start = start

    def queued(self) -> None:
        assert self._cluster.job(self._job_id)["status"] == "queued"

    def fetch(self) -> None:
        """The Hub says nothing any more."""
        hub = self._cluster.hub
        hub.hold[WEIGHTS] = threading.Event()
        before = self._downloads()
        self._start("canceller", ahead=120)
        eventually(lambda: self._downloads() > before, 30, "the model is not fetched")

    def plan(self) -> None:
        for held in self._cluster.hub.hold.values():
            held.set()
        self._cluster.hub.hold.clear()
        self._cluster.hold_at(self._job_id, "plan")

    def compress(self) -> None:
        self._cluster.wait_for_layers(self._job_id, 3)
        os.kill(self._cluster.engine(), signal.SIGSTOP)

    def verify(self) -> None:
        self._cluster.hold_at_verify(self._job_id)

    def upload(self) -> None:
        """The store is slow."""
        engine = self._cluster.hold_at_verify(self._job_id)
        self._cluster.gate.rate = 20_000
        os.kill(engine, signal.SIGCONT)
        eventually(lambda: bool(self._cluster.attempts_with_files(self._job_id)), 30, "nothing is uploaded")

    def _downloads(self) -> int:
        requests = self._cluster.hub.requests
        return sum(n for request, n in requests.items() if request.startswith("GET") and WEIGHTS in request)


PHASES = ("queued", "fetch", "plan", "compress", "verify", "upload")


def test_a_cancel_takes_effect_in_every_phase_and_the_retry_goes_on(
    cluster: Cluster, start: Start, record_property: Record
) -> None:
    """One job, in one phase after the other. The engine stands still meanwhile: the worst that it can do."""
    job_id = cluster.submit(**cluster.body)
    held = Held(cluster, job_id, start)
    for phase in PHASES:
        getattr(held, phase)()
        if phase != "queued":
            assert cluster.job(job_id)["phase"] == phase
        asked = time.monotonic()
        cluster.client.cancel(job_id)
        assert cluster.wait(job_id, CANCEL_SECONDS)["status"] == "cancelled"
        record_property(f"cancelled in {phase} after seconds", time.monotonic() - asked)
        assert cluster.engines() == cluster.fetchers() == []
        assert not cluster.has_artifacts(job_id)
        cluster.client.retry(job_id)
    cluster.gate.rate = None

    cluster.succeed(job_id)
    assert cluster.outcomes(job_id) == ["cancelled"] * (len(PHASES) - 1) + ["succeeded"]
    solved: list[int] = []
    for attempt in range(1, len(PHASES) + 1):
        if attempt > 2:  # those before did not come to the layers
            assert cluster.layers(job_id, "layer_replayed", attempt) == solved
        solved += cluster.layers(job_id, "layer_solved", attempt)
    assert solved == list(range(LAYERS))
    assert_published(cluster, job_id)
