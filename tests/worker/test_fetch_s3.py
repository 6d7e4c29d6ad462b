"""Jobs whose text or model is in S3: the fetcher has the credentials, and the first attempt pins the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import undefer_group

from api.jobs import service
from api.jobs.ledger.models import Attempt, Job, JobStatus
from tests.support.s3 import READER, S3Server
from tests.worker.conftest import Submit
from worker.context import WorkerContext
from worker.engine import engine_environment, fetcher_environment
from worker.heartbeat import Presence
from worker.tasks import run_jobs

BODY: dict[str, Any] = {
    "scheme": "W8A8",
    "method": "rtn",
    "calibration": {"num_calibration_samples": 2, "max_seq_length": 64},
    "evaluation": {"num_samples": 1},
}
NEVER = {"max_perplexity_ratio": 0.01}
"""A gate that no job passes: it can be retried afterwards."""


@pytest.fixture(autouse=True)
def _a_reader(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, tmp_path)


def run(worker: WorkerContext, job_id: str) -> Job:
    run_jobs(worker, Presence(worker))
    with worker.database.read() as session:
        return session.get_one(Job, job_id, options=[undefer_group("work")])


def run_again_elsewhere(worker: WorkerContext, job_id: str, tmp_path: Path) -> Job:
    """Retry a job as a worker does that has nothing of it in its cache."""
    shutil.rmtree(tmp_path / "huggingface")
    with worker.database.write() as session:
        project = session.get_one(Job, job_id).project_id
        service.retry(session, project, job_id, max_queued=None)
    return run(worker, job_id)


def test_a_job_succeeds_and_says_which_text_it_was(
    worker: WorkerContext, submit: Submit, s3: S3Server, tiny_texts: Path
) -> None:
    s3.put("job.jsonl", tiny_texts.read_bytes())
    job = run(worker, submit(**BODY, dataset="s3://texts/job.jsonl"))
    assert (job.status, job.error_message) == (JobStatus.SUCCEEDED, None)
    assert job.dataset is not None
    assert job.resolved_plan is not None
    origin = job.resolved_plan["origins"]["dataset"]
    assert (origin["etag"], origin["size"]) == (job.dataset["etag"], tiny_texts.stat().st_size)
    assert READER[1] not in json.dumps([job.dataset, job.resolved_plan])


def test_a_retry_says_that_the_text_changed(
    worker: WorkerContext, submit: Submit, s3: S3Server, tiny_texts: Path, tmp_path: Path
) -> None:
    s3.put("changing.jsonl", tiny_texts.read_bytes())
    job = run(worker, submit(**BODY, dataset="s3://texts/changing.jsonl", quality_gate=NEVER))
    assert job.error_code == "quality_gate_failed"
    s3.put("changing.jsonl", tiny_texts.read_bytes() + b"\n")
    again = run_again_elsewhere(worker, job.id, tmp_path)
    assert (again.status, again.error_code) == (JobStatus.FAILED, "dataset_changed")


def test_with_versions_a_retry_has_the_same_text(
    worker: WorkerContext, submit: Submit, s3: S3Server, tiny_texts: Path, tmp_path: Path
) -> None:
    s3.put("kept.jsonl", tiny_texts.read_bytes(), bucket="versioned")
    job = run(worker, submit(**BODY, dataset="s3://versioned/kept.jsonl", quality_gate=NEVER))
    assert job.error_code == "quality_gate_failed"
    s3.put("kept.jsonl", b"other text", bucket="versioned")
    again = run_again_elsewhere(worker, job.id, tmp_path)
    assert (again.error_code, again.work_key) == ("quality_gate_failed", job.work_key)


def test_what_may_not_be_read_fails_the_job(worker: WorkerContext, submit: Submit, s3: S3Server) -> None:
    s3.put("a.jsonl", b'{"text": "words"}', bucket="private")
    job = run(worker, submit(**BODY, dataset="s3://private/a.jsonl"))
    assert (job.status, job.error_code, job.attempts_made) == (JobStatus.FAILED, "s3_access_denied", 1)


def test_a_store_that_does_not_answer_is_asked_again(
    worker: WorkerContext, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    job = run(worker, submit(**BODY, dataset="s3://texts/a.jsonl"))
    assert (job.status, job.attempts_counted) == (JobStatus.QUEUED, 1)
    with worker.database.read() as session:
        assert session.get_one(Attempt, (job.id, 1)).error_code == "s3_unreachable"


def test_credentials_reach_the_fetcher_of_such_jobs_and_not_the_engine(tmp_path: Path) -> None:
    given = {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "http://store"}
    assert fetcher_environment(tmp_path, given, s3=True).items() >= given.items()
    assert not fetcher_environment(tmp_path, given).keys() & given.keys()
    assert not engine_environment(tmp_path, given).keys() & given.keys()


class TestModels:
    """A model in S3 is pinned when the job is submitted."""

    @pytest.fixture
    def model(self, s3: S3Server, tiny_llama: Path, tmp_path: Path) -> str:
        key = f"models/{tmp_path.name}/tiny"
        s3.put_folder(tiny_llama, key)
        return f"s3://texts/{key}"

    def test_a_job_succeeds_and_says_which_model_it_was(
        self, worker: WorkerContext, submit: Submit, model: str
    ) -> None:
        job = run(worker, submit(**BODY, model=model))
        assert (job.status, job.error_message) == (JobStatus.SUCCEEDED, None)
        assert job.resolved_plan is not None
        revision = job.source.removeprefix(f"{model}@")
        assert job.resolved_plan["origins"] == {"model": {"s3": model, "revision": revision}}
        assert job.cache_key is not None
        assert READER[1] not in json.dumps(job.resolved_plan)

    def test_a_model_that_changed_meanwhile_fails_the_job(
        self, worker: WorkerContext, submit: Submit, s3: S3Server, model: str
    ) -> None:
        job_id = submit(**BODY, model=model)
        s3.put(f"{model.removeprefix('s3://texts/')}/README.md", b"A card.")
        job = run(worker, job_id)
        assert (job.status, job.error_code, job.attempts_made) == (JobStatus.FAILED, "model_changed", 1)
