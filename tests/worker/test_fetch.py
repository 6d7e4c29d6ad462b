"""Jobs whose model and text are on the Hub: a process of its own fetches, the engine works offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import undefer_group

from api.jobs.ledger import events
from api.jobs.ledger.models import Job, JobStatus
from tests.support.hub import Hub, running_hub
from tests.worker.conftest import Submit
from worker.context import WorkerContext
from worker.engine import engine_environment, fetcher_environment
from worker.heartbeat import Presence
from worker.tasks import run_jobs

MODEL, TEXTS = "someone/tiny", "someone/texts"
BODY: dict[str, Any] = {
    "model": MODEL,
    "dataset": TEXTS,
    "scheme": "W8A8",
    "method": "rtn",
    "calibration": {"num_calibration_samples": 2, "max_seq_length": 64},
    "evaluation": {"num_samples": 1},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tiny_texts: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        hub.add_model(MODEL, tiny_llama, token="hf_right")
        hub.add_dataset(TEXTS, {"train.jsonl": tiny_texts.read_bytes()})
        yield hub


def run(worker: WorkerContext, job_id: str) -> tuple[Job, list[dict[str, Any]]]:
    run_jobs(worker, Presence(worker))
    with worker.database.read() as session:
        told = events.page(session, job_id, 0, 100)
        job = session.get_one(Job, job_id, options=[undefer_group("work")])
        return job, [{"type": event.type, **event.data} for event in told]


def test_a_job_from_the_hub_succeeds_and_says_where_it_came_from(
    worker: WorkerContext, submit: Submit, hub: Hub
) -> None:
    job_id = submit(**BODY)
    job, told = run(worker, job_id)
    assert (job.status, job.error_message) == (JobStatus.SUCCEEDED, None)
    phases = [event["phase"] for event in told if event["type"] == "phase_changed"]
    assert phases == ["fetch", "plan", "compress", "verify", "upload"]
    fetched = [event for event in told if event["type"] == "fetch_progress" and event["what"] == "model"]
    assert fetched[-1]["done"] == fetched[-1]["total"] > 0
    assert job.resolved_plan is not None
    assert job.resolved_plan["origins"] == {
        "model": {"hub": MODEL, "revision": hub.repositories["models", MODEL].commit},
        "dataset": {"hub": TEXTS, "revision": hub.repositories["datasets", TEXTS].commit},
    }
    assert "hf_right" not in json.dumps(told)


def test_a_wrong_digest_fails_the_job_with_its_code(worker: WorkerContext, submit: Submit, hub: Hub) -> None:
    job_id = submit(**BODY)
    hub.corrupt.add("model.safetensors")
    job, _ = run(worker, job_id)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "hub_digest_mismatch")


def test_the_token_reaches_the_fetcher_and_not_the_engine(tmp_path: Path) -> None:
    given = {
        "HF_TOKEN": "hf_right",
        "HF_HOME": "/cache",
        "HF_ENDPOINT": "http://mirror",
        "https_proxy": "http://proxy",
        "BITMILL_SECRET_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    engine, fetcher = engine_environment(tmp_path, given), fetcher_environment(tmp_path, given)
    assert (engine["HF_HOME"], engine["HF_HUB_OFFLINE"]) == ("/cache", "1")
    assert not engine.keys() & {"HF_TOKEN", "HF_ENDPOINT", "https_proxy"}
    assert {**given, "HF_HUB_OFFLINE": "0"}.items() >= {
        (name, value) for name, value in fetcher.items() if name in given or name == "HF_HUB_OFFLINE"
    }
    assert fetcher["HF_TOKEN"] == "hf_right"
    assert not fetcher.keys() & {"BITMILL_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"}
