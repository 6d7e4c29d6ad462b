"""Models and text that jobs of these tests work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_dataset, tiny_model

LAYERS = 40  # many small layers: a run that lasts long enough to be interrupted in the middle


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with two models, `deep` and `small`, and the text `texts.jsonl`."""
    root = tmp_path_factory.mktemp("inputs")
    shape = {"hidden": 64, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 32}
    tiny_model(root / "deep", layers=LAYERS, **shape)
    tiny_model(root / "small", layers=2, **shape)
    tiny_dataset(root / "texts.jsonl")
    return root


@pytest.fixture(scope="session")
def deep(inputs: Path) -> dict[str, Any]:
    """The body of a job of some seconds: GPTQ with data, evaluated."""
    return {
        "model": str(inputs / "deep"),
        "dataset": str(inputs / "texts.jsonl"),
        "scheme": "W4A16",
        "group_size": 32,
        "observer": "minmax",
        "calibration": {"num_calibration_samples": 4, "max_seq_length": 64},
        "evaluation": {"num_samples": 2},
    }


@pytest.fixture(scope="session")
def small(inputs: Path) -> dict[str, Any]:
    """The body of the cheapest job: RTN without data."""
    return {"model": str(inputs / "small"), "scheme": "W4A16", "group_size": 32, "observer": "minmax"}
