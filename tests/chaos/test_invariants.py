"""What the harness looks for it also finds: every promise is broken once, by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update
from sqlalchemy.orm import Session

import migrations
from api.database import Database, now
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobEvent, JobLayer, JobStatus
from api.jobs.queue import expiry, leases
from api.jobs.queue.leases import Lease
from api.jobs.queue.workers import WorkerIdentity
from api.projects.repository import get_or_create_project
from api.store.base import go_on
from api.store.local import LocalStore
from tests.chaos.invariants import Deaths, check
from tests.support.jobs import PLAN_ID, new_plan
from worker.upload import publish

LAYERS = 2
DEAD = 41
WORKER = WorkerIdentity(f"some-host-{DEAD}-0badcafe", "cpu", 1 << 40, 0)
DEATHS = Deaths(frozenset({DEAD}), engines=1)
WORK_KEY = "w" * 64


@dataclass(frozen=True)
class World:
    """A job that went well at its third attempt: an engine was killed, then a worker."""

    database: Database
    store: LocalStore

    def complaints(self, deaths: Deaths = DEATHS, accepted: tuple[str, ...] = ("job",)) -> list[str]:
        with self.database.read() as session:
            return check(session, self.store, accepted, deaths)

    def write(self, change: Callable[[Session], Any]) -> None:
        with self.database.write() as session:
            change(session)


def _layer(number: int) -> dict[str, Any]:
    entry = {"layer": number, "file": f"{number}.safetensors", "sha256": "a" * 64, "size": 7, "report": {}}
    told = {"layers_total": LAYERS, "relative_error": 0.1, "seconds": 1.0, "eta_seconds": 1.0}
    return {"layer": number, **told, "entry": entry}


def _claim(session: Session, lease_seconds: float) -> Lease:
    session.execute(update(Job).values(available_at=now(session)))
    claimed = leases.claim(session, WORKER, lease_seconds)
    assert claimed is not None
    return claimed[0]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    url = f"sqlite:///{tmp_path}/jobs.db"
    migrations.upgrade(url)
    store = LocalStore(tmp_path / "store")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "model.safetensors").write_bytes(b"weights")
    with closing(Database(url)) as database:
        with database.write() as session:
            _live(session, store, tmp_path / "output")
        yield World(database, store)


def _live(session: Session, store: LocalStore, output: Path) -> None:
    session.add(new_plan())
    session.add(_job(get_or_create_project(session, "p").id, session))
    session.flush()
    first = _claim(session, 60)
    leases.save_plan(session, first, {"work_key": WORK_KEY, "fingerprint": "f" * 64})
    leases.record_layer(session, first, _layer(0), "work/0")
    leases.fail(session, first, AttemptOutcome.CRASHED, "engine_crashed", "killed", retryable=True)
    _claim(session, -1)
    assert expiry.reap(session) == 1
    last = _claim(session, 60)
    leases.record_layer(session, last, _layer(1), "work/1")
    leases.succeed(session, last, {}, publish(store, output, "job", last.token, {}, go_on))


def _job(project_id: str, session: Session) -> Job:
    moment = now(session)
    return Job(
        id="job", project_id=project_id, labels={}, priority=0, model="m", source="/m", scheme="W4A16",
        method="rtn", recipe={}, calibration={}, evaluation={}, plan_id=PLAN_ID, max_attempts=9,
        device_class="any", required_host_bytes=0, required_gpu_bytes=0, status=JobStatus.QUEUED,
        layers_total=LAYERS, created_at=moment, available_at=moment,
    )  # fmt: skip


def test_all_is_well(world: World) -> None:
    assert world.complaints() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (update(Job).values(status=JobStatus.RUNNING), "job is running"),
        (update(Job).values(status=JobStatus.FAILED), "job is failed"),
        (
            update(JobEvent).where(JobEvent.type == "job_succeeded").values(type="warning"),
            "job ended 0 times, by 1 attempts",
        ),
        (
            update(JobEvent).where(JobEvent.type == "attempt_ended", JobEvent.attempt == 1)
            .values(type="job_failed"),
            "job ended 2 times, by 1 attempts",
        ),
        (
            update(Attempt).where(Attempt.number == 1).values(outcome=AttemptOutcome.SUCCEEDED),
            "job ended 1 times, by 2 attempts",
        ),
        (delete(JobEvent).where(JobEvent.seq == 2), "job has a gap in its events"),
        (update(JobEvent).where(JobEvent.seq == 1).values(seq=0), "job has a gap in its events"),
        (update(Job).values(event_seq=Job.event_seq + 1), "job has a gap in its events"),
        (
            update(JobEvent).where(JobEvent.type == "layer_solved").values(data={"layer": 1}),
            "job did not tell each of its layers once",
        ),
        (
            update(JobEvent).where(JobEvent.type == "attempt_ended", JobEvent.attempt == 1)
            .values(type="layer_solved", data={"layer": 0}),
            "job did not tell each of its layers once",
        ),
        (delete(JobLayer).where(JobLayer.layer == 0), "job finished other layers"),
        (update(JobLayer).where(JobLayer.layer == 0).values(work_key="x" * 64), "job finished other layers"),
        (
            update(Attempt).where(Attempt.number == 1)
            .values(outcome=AttemptOutcome.FAILED, error_code="disk_full"),
            "attempt 1 of job is failed: disk_full",
        ),
        (update(Attempt).where(Attempt.number == 1).values(outcome=None), "an attempt of job has no end"),
        (update(Job).values(manifest_key=None), "job published None"),
    ],
)  # fmt: skip
def test_a_damaged_database_is_noticed(world: World, change: Any, complaint: str) -> None:
    world.write(lambda session: session.execute(change))
    assert [found for found in world.complaints() if found.startswith(complaint)]


def test_a_job_that_nobody_heard_of_is_noticed(world: World) -> None:
    assert world.complaints(accepted=()) == ["0 jobs were accepted under 0 ids; there are 1"]
    assert world.complaints(accepted=("job", "job")) == ["2 jobs were accepted under 1 ids; there are 1"]


def test_an_attempt_that_counts_although_nothing_of_it_was_killed_is_noticed(world: World) -> None:
    (found,) = world.complaints(Deaths(frozenset({DEAD + 1}), engines=1))
    assert found.startswith("attempt 2 of job lost its lease")
    assert world.complaints(Deaths(frozenset({DEAD}), engines=0)) == ["1 engines crashed, 0 were killed"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "job lacks model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"weightz"),
            "model.safetensors of job is not what its manifest says",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "job published"),
        (lambda folder: shutil.copytree(folder, folder.parent / "99"), "job published"),
    ],
)
def test_a_damaged_store_is_noticed(world: World, damage: Callable[[Path], object], complaint: str) -> None:
    with world.database.read() as session:
        key = session.get_one(Job, "job").manifest_key
    assert key is not None
    damage((world.store.root / key).parent)
    (found,) = world.complaints()
    assert found.startswith(complaint)
