"""One `bitmill serve` and what can happen to a job: it succeeds, dies, is stopped, is hopeless."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from api.client.types import JobSubmit
from tests.integration.conftest import LAYERS
from tests.integration.service import Process, Service, eventually, free_port

Body = dict[str, Any]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("embedded"), inputs)
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def uninterrupted(service: Service, deep: Body) -> str:
    """A job that nothing disturbed."""
    job_id = service.submit(**deep)
    service.succeed(job_id)
    return job_id


def assert_resumed(service: Service, job_id: str, uninterrupted: str) -> None:
    """Each later attempt replayed all that was finished before it, and no layer was solved twice; the bytes
    are those of an undisturbed run."""
    solved: list[int] = []
    for attempt in range(1, len(service.outcomes(job_id)) + 1):
        assert service.layers(job_id, "layer_replayed", attempt) == solved
        solved += service.layers(job_id, "layer_solved", attempt)
        assert len(solved) >= 3
    assert solved == list(range(LAYERS))
    assert service.weights(job_id) == service.weights(uninterrupted)


def test_what_was_made_or_is_being_made_is_not_made_again(
    service: Service, uninterrupted: str, deep: Body
) -> None:
    found = service.client.submit(cast("JobSubmit", deep))  # by a worker, if it reads the files once more
    service.succeed(found["id"])
    assert service.job(found["id"])["deduplicated_from"] == uninterrupted
    assert service.outcomes(found["id"]) in ([], ["deduplicated"])
    job = service.client.submit(cast("JobSubmit", deep))
    assert (job["status"], job["deduplicated_from"] is None) == ("succeeded", False)
    assert service.weights(job["id"]) == service.weights(uninterrupted)

    other = deep | {"calibration": deep["calibration"] | {"seed": 1}}
    first = service.client.submit(cast("JobSubmit", other))["id"]
    second = service.client.submit(cast("JobSubmit", other))
    assert (second["status"], second["deduplicated_from"]) == ("queued", first)
    service.succeed(first)
    service.succeed(second["id"])
    assert service.outcomes(second["id"]) == []
    assert service.weights(second["id"]) == service.weights(first) != service.weights(uninterrupted)


def test_a_job_goes_from_submission_to_verified_files(service: Service, uninterrupted: str) -> None:
    job = service.job(uninterrupted)
    types = [event["type"] for event in service.events(uninterrupted)]
    phases = [e["data"]["phase"] for e in service.events(uninterrupted) if e["type"] == "phase_changed"]
    assert (types[0], types[1], types[-2:]) == (
        "job_queued",
        "attempt_started",
        ["attempt_ended", "job_succeeded"],
    )
    assert phases == ["fetch", "plan", "compress", "verify", "upload"]
    assert service.layers(uninterrupted, "layer_solved", 1) == list(range(LAYERS))
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["succeeded"]
    assert job["attempts"][0]["peak_host_bytes"] > 100 << 20

    digests = service.download(uninterrupted)
    assert {"config.json", "recipe.yaml", "README.md", "bitmill.json"} <= digests.keys()
    assert sum(name.endswith(".safetensors") for name in digests) > LAYERS
    report = service.client.report(uninterrupted)
    assert report["evaluation"]["perplexity_compressed"] > 0
    assert len(report["modules"]) == 7 * LAYERS
    assert service.scratch() == []


def test_a_killed_engine_is_replaced_and_a_cancelled_job_resumes_on_retry(
    service: Service, deep: Body, uninterrupted: str
) -> None:
    job_id = service.submit(**deep)
    service.wait_for_layers(job_id, 3)
    os.kill(service.engine(), signal.SIGKILL)

    service.wait_for_layers(job_id, 15)
    service.client.cancel(job_id)
    assert service.wait(job_id, seconds=5)["status"] == "cancelled"
    assert service.engines() == []
    assert not service.has_artifacts(job_id)

    service.client.retry(job_id)
    service.succeed(job_id)
    assert service.outcomes(job_id) == ["crashed", "cancelled", "succeeded"]
    assert service.job(job_id)["attempts"][0]["exit_signal"] == signal.SIGKILL
    assert_resumed(service, job_id, uninterrupted)


def test_a_job_outlives_its_server_killed_or_stopped(
    service: Service, deep: Body, uninterrupted: str
) -> None:
    job_id = service.submit(**deep)
    service.wait_for_layers(job_id, 3)
    engine = service.engine()
    assert service.serve is not None
    service.serve.kill()
    eventually(lambda: engine not in service.engines(), 5, "the engine outlived its server by 5 seconds")
    assert service.scratch() != []

    service.start()
    service.wait_for_layers(job_id, 15)
    assert service.serve.stop() == 0
    assert service.engines() == []
    assert service.scratch() == []

    service.start()
    service.succeed(job_id)
    assert service.outcomes(job_id) == ["preempted", "preempted", "succeeded"]
    assert_resumed(service, job_id, uninterrupted)


def test_max_runtime_seconds_ends_a_job(service: Service, deep: Body) -> None:
    job = service.wait(service.submit(**deep, max_runtime_seconds=1))
    assert (job["status"], job["error"]["code"]) == ("failed", "max_runtime_seconds")
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["timed_out"]
    assert service.engines() == []


def test_a_missed_quality_gate_keeps_the_report_and_publishes_nothing(
    service: Service, deep: Body, inputs: Path
) -> None:
    body = {**deep, "model": str(inputs / "small"), "quality_gate": {"max_perplexity_ratio": 0.5}}
    job_id = service.submit(**body)
    job = service.wait(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "quality_gate_failed")
    assert service.client.report(job_id)["evaluation"]["perplexity_ratio"] > 0.5
    assert not service.has_artifacts(job_id)


def test_hopeless_jobs_fail_with_their_codes_and_the_next_job_is_unharmed(
    service: Service, small: Body, inputs: Path
) -> None:
    full_disk = service.submit(**small)
    not_a_number = service.submit(**{**small, "model": str(with_a_nan(inputs))})
    good = service.submit(**small)
    resource.prlimit(service.engine(), resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))

    failed = service.wait(full_disk)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "disk_full")
    failed = service.wait(not_a_number)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "non_finite_weights")
    assert "model.layers.1.mlp.up_proj" in failed["error"]["message"]
    assert service.outcomes(not_a_number) == ["failed"]
    service.succeed(good)
    assert service.scratch() == []


def with_a_nan(inputs: Path) -> Path:
    """The small model with one weight that is not a number."""
    folder = shutil.copytree(inputs / "small", inputs / "with_a_nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_second_server_on_the_same_data_folder_is_refused(service: Service) -> None:
    second = Process("serve", service.folder, {**service.settings, "PORT": str(free_port())})
    eventually(lambda: not second.is_running(), 30, "the second server runs")
    assert "Another `bitmill serve` uses" in second.log.read_text()
    assert service.client.ready()["status"] == "ready"
