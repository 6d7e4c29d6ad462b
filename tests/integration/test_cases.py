"""Small inputs that failed in tools like ours, over HTTP: those of tests/compression/test_cases.py, and
models whose config.json says odd things. Each runs, or is tried once and says what is wrong.

What is refused when it is submitted is in tests/api/jobs/test_submitting.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import yaml

from api.client.types import JobDetail, JobSubmit
from tests.compression import test_cases as cases
from tests.integration.service import Service
from tests.support.models import tiny_model

_FACTORS = 32  # half of a tiny head's dimension
_ROPE = {"rope_theta": 10000.0}
_CONFIGS: dict[str, dict[str, Any]] = {
    "tied_flag_other_head": {"tie_word_embeddings": True},
    "longrope": {
        "max_position_embeddings": 131_072,
        "rope_parameters": _ROPE
        | {
            "rope_type": "longrope",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * _FACTORS,
            "long_factor": [2.0] * _FACTORS,
        },
    },
    "dynamic_rope": {"rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    "null_kv_heads": {"num_key_value_heads": None},
    "return_dict_false": {"return_dict": False},
}
"""By the name of a case: what its config.json says."""


def _with_config(name: str) -> cases.Make:
    def make(folder: Path) -> list[str]:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | _CONFIGS[name]))
        return cases.texts(folder, b"")

    make.__name__ = name
    return make


_RUN: dict[cases.Make, str] = {
    cases.half_surrogate: "",
    cases.one_long_row: "",
    cases.one_bad_chat: "rows_dropped",
    cases.peer_kv: "",
    cases.peer_sparse_stage: "pruned_stored_dense",
    cases.peer_smoothquant: "pattern_matches_nothing",
    **{
        _with_config(name): "tie_flag_contradicts_checkpoint" if name == "tied_flag_other_head" else ""
        for name in _CONFIGS
    },
}
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
    given = dict(zip(options, [*options[1:], ""], strict=True))
    samples = int(given.get("--num-calibration-samples", 4))
    what: dict[str, Any] = {"scheme": "W8A16", "method": "rtn"}
    if "--recipe" in given:
        what = {"recipe": yaml.safe_load(Path(given["--recipe"]).read_text())}
    return {
        **what,
        "model": str(folder / "model"),
        "dataset": given["--dataset"],
        "cache": "bypass",
        "calibration": {
            "num_calibration_samples": samples,
            "max_seq_length": 128,
            "packing": "--no-packing" not in options,
        },
        "evaluation": {"num_samples": 2},
    }


def _is_make(value: object) -> bool:
    """Whether it makes a case: by its signature, as those of a recipe are functions that a function made."""
    signature = {"folder": "Path", "return": "list[str]"}
    return callable(value) and getattr(value, "__annotations__", None) == signature


def test_no_case_is_left_out() -> None:
    makers = {value for value in vars(cases).values() if _is_make(value)}
    assert len(makers) == 10
    assert makers - {*_RUN, *_REFUSED} == set()
    assert {make.__name__ for make in _RUN} >= _CONFIGS.keys()


def test_each_ends_as_it_should_at_its_first_attempt(tmp_path: Path) -> None:
    root = tmp_path / "root"
    model = tiny_model(root / "tiny", layers=1, kv_heads=4)
    service = Service(tmp_path, root)
    try:
        service.start()
        jobs: dict[cases.Make, str] = {}
        for number, make in enumerate((*_RUN, *_REFUSED)):
            folder = root / f"{number} {make.__name__}"
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
