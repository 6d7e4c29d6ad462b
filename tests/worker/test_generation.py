"""A job whose model writes the calibration text itself."""

from __future__ import annotations

from sqlalchemy.orm import undefer_group

from api.jobs.ledger import events
from api.jobs.ledger.models import Job, JobStatus
from tests.worker.conftest import Submit
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.tasks import run_jobs


def test_it_succeeds_and_tells_of_the_writing(worker: WorkerContext, submit: Submit) -> None:
    job_id = submit(
        dataset="self",
        scheme="W4A16",
        calibration={"num_calibration_samples": 2, "max_seq_length": 64},
        evaluation={"num_samples": 1},
    )
    run_jobs(worker, Presence(worker))
    with worker.database.read() as session:
        told = [(event.type, event.data) for event in events.page(session, job_id, 0, 100)]
        job = session.get_one(Job, job_id, options=[undefer_group("work")])
    assert (job.status, job.error_message) == (JobStatus.SUCCEEDED, None)
    phases = [data["phase"] for kind, data in told if kind == "phase_changed"]
    assert phases == ["fetch", "plan", "generate", "compress", "verify", "upload"]
    progress = [data for kind, data in told if kind == "generation_progress"]
    assert progress[-1]["done"] == progress[-1]["total"] > 0
