"""A worker on real parts: SQLite as the migrations make it, a local store, tiny models, the real engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import migrations
from api.jobs import service, submitting
from api.jobs.ledger.models import Job
from api.jobs.submission.planning import plan_job
from api.jobs.submission.request import JobSubmit
from api.projects.repository import get_or_create_project
from api.projects.service import s3_access
from api.settings import Settings
from worker.context import WorkerContext

Submit = Callable[..., str]


@pytest.fixture
def worker(tmp_path: Path, tiny_llama: Path, tiny_texts: Path) -> Iterator[WorkerContext]:
    """A worker in a data folder of its own, on this machine's CPU."""
    roots = (tiny_llama.parent, tiny_texts.parent)
    prefixes = ("s3://texts", "s3://versioned", "s3://private")
    settings = Settings(data_dir=tmp_path / "data", local_roots=roots, s3_prefixes=prefixes, device="cpu")
    migrations.upgrade(settings.database_url)
    context = WorkerContext.open(settings)
    yield context
    context.close()


def queue(worker: WorkerContext, **fields: Any) -> str:
    """Queue a job that is run whatever others made, as the route does."""
    body = JobSubmit.model_validate({"cache": "bypass", **fields})
    with worker.database.write() as session:
        project = get_or_create_project(session, "default")
        access = s3_access(session, project.id, worker.settings)
    planned = plan_job(body, worker.settings, access)
    with worker.database.write() as session:
        made = submitting.create(session, project.id, planned, worker.settings, None, max_queued=None)
    return made.job.id


@pytest.fixture
def submit(worker: WorkerContext, tiny_llama: Path) -> Submit:
    """Queue a job; by default the cheapest one."""

    def submit(**fields: Any) -> str:
        return queue(worker, **{"model": str(tiny_llama), "scheme": "W8A8", **fields})

    return submit


@pytest.fixture
def slow_to_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes engines stay for so many seconds after their last word."""

    def stay(seconds: float) -> None:
        (tmp_path / "sitecustomize.py").write_text(
            "import atexit, sys, time\n"
            f'if "worker.runner" in sys.orig_argv: atexit.register(time.sleep, {seconds})\n'
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return stay


def until_an_engine_is_done(worker: WorkerContext) -> None:
    """Until the result of the running attempt is in its folder, and the engine has said its last word."""
    while not any(worker.scratch.folder.glob("*/output")):
        time.sleep(0.01)
    time.sleep(1)


def cancel(worker: WorkerContext, job_id: str) -> float:
    """Ask for a job's cancellation; the time.monotonic() of that."""
    with worker.database.write() as session:
        service.cancel(session, session.get_one(Job, job_id).project_id, job_id)
    return time.monotonic()
