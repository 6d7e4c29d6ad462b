"""The snippet of LLM Compressor's guide, and the same recipe over HTTP: the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.service import Service
from tests.support.models import tiny_dataset, tiny_model

GUIDE = """\
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor import oneshot

recipe = [
    SmoothQuantModifier(smoothing_strength=0.8),
    GPTQModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"]),
]
oneshot(
    model="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    dataset="open_platypus",
    recipe=recipe,
    output_dir="TinyLlama-1.1B-Chat-v1.0-INT8",
    max_seq_length=2048,
    num_calibration_samples=512,
)
"""
OUTPUT = "TinyLlama-1.1B-Chat-v1.0-INT8"
RECIPE = [
    {"type": "SmoothQuantModifier", "smoothing_strength": 0.8},
    {"type": "GPTQModifier", "scheme": "W8A8", "targets": "Linear", "ignore": ["lm_head"]},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with the smallest `model` and as much text as the guide takes: 1.1 million tokens."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_model(root / "model", hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=16)
    tiny_dataset(root / "texts.jsonl", 300, sentences=130)
    return root


@pytest.fixture
def service(tmp_path: Path, inputs: Path) -> Iterator[Service]:
    running = Service(tmp_path, inputs)
    try:
        running.start()
        yield running
    finally:
        running.close()


def changed(line: str, model: str, dataset: str) -> str:
    """A line of the guide as it is here: other imports, another model, another dataset."""
    if line.startswith("from llmcompressor"):
        return f"from compression import {line.split(' import ')[1]}"
    line = line.replace('model="TinyLlama/TinyLlama-1.1B-Chat-v1.0"', f"model={model!r}")
    return line.replace('dataset="open_platypus"', f"dataset={dataset!r}")


def run_guide(folder: Path, model: str, dataset: str) -> Path:
    """Run the snippet as a script of its own; the folder that it makes."""
    lines = [changed(line, model, dataset) for line in GUIDE.splitlines()]
    altered = sum(now != before for now, before in zip(lines, GUIDE.splitlines(), strict=True))
    assert altered == 5  # three imports, the model, the dataset
    (folder / "guide.py").write_text("\n".join(lines))
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "guide.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / OUTPUT


def test_the_guide_s_snippet_and_the_service_give_the_same_bytes(
    service: Service, inputs: Path, tmp_path: Path
) -> None:
    model, dataset = str(inputs / "model"), str(inputs / "texts.jsonl")
    body: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "recipe": RECIPE,
        "calibration": {"max_seq_length": 2048, "num_calibration_samples": 512},
    }
    job_id = service.submit(**body)
    output = run_guide(tmp_path, model, dataset)
    service.succeed(job_id)
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")
    }
    assert service.weights(job_id) == digests
    assert len(digests) == 3
    record = json.loads((output / "bitmill.json").read_text())
    assert record["provenance"]["fingerprint"] == service.client.report(job_id)["fingerprint"]
