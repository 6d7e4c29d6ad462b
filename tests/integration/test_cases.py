"""The inputs of tests/compression/test_cases.py over HTTP: what cannot succeed is tried once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from api.client.types import JobDetail, JobSubmit
from tests.compression import test_cases as cases
from tests.integration.service import Service
from tests.support.models import tiny_model

_RUN: dict[cases.Make, str] = {cases.half_surrogate: "", cases.one_bad_chat: "rows_dropped"}
"""Makers of inputs that run -> a warning of the report."""
_REFUSED: dict[cases.Make, tuple[str, str]] = {
    cases.deep: ("dataset_invalid", "Line 41"),
    cases.template_divides: ("dataset_invalid", "line 2: ZeroDivisionError"),
    cases.no_default_template: ("chat_template_missing", "default"),
    cases.later_tokenizer: ("tokenizer_invalid", "tokenizer.json"),
}
"""Makers of inputs that cannot succeed -> the code of the job's error, and what it says."""


def _body(folder: Path, make: cases.Make) -> dict[str, Any]:
    options = make(folder)
    samples = "--num-calibration-samples"
    return {
        "model": str(folder / "model"),
        "dataset": options[options.index("--dataset") + 1],
        "scheme": "W8A16",
        "method": "rtn",
        "calibration": {
            "num_calibration_samples": int(options[options.index(samples) + 1]) if samples in options else 4,
            "max_seq_length": 128,
            "packing": "--no-packing" not in options,
        },
        "evaluation": {"num_samples": 2},
    }


def test_each_ends_as_it_should_at_its_first_attempt(tmp_path: Path) -> None:
    root = tmp_path / "root"
    model = tiny_model(root / "tiny")
    service = Service(tmp_path, root)
    try:
        service.start()
        jobs: dict[cases.Make, str] = {}
        for make in (*_RUN, *_REFUSED):
            folder = root / make.__name__
            shutil.copytree(model, folder / "model")
            jobs[make] = service.client.submit(cast("JobSubmit", _body(folder, make)))["id"]
        for make, warning in _RUN.items():
            job = _ended(service, jobs[make])
            assert job["status"] == "succeeded", (make.__name__, job["error"])
            report = service.client.report(job["id"])
            assert not warning or warning in [each["code"] for each in report["warnings"]]
        for make, (code, says) in _REFUSED.items():
            job = _ended(service, jobs[make])
            assert job["status"] == "failed"
            assert job["error"] is not None
            assert (job["error"]["code"], len(job["attempts"])) == (code, 1)
            assert says in job["error"]["message"]
    finally:
        service.close()


def _ended(service: Service, job_id: str) -> JobDetail:
    return service.client.wait(job_id, timeout_seconds=120)
