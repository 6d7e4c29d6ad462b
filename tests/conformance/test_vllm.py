"""vLLM loads what the engine writes and answers sensibly: `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.demo.data import make_demo_dataset
from cli.demo.model import make_demo_model

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CACHE = ROOT / ".demo"
"""Where `make demo` keeps the same model, so that it is downloaded once."""

QUESTION = "What is the capital of France?"

SCHEMES = {
    "W4A16": ("--method", "gptq", "--group-size", "64"),
    "W8A8": ("--method", "gptq"),
    "FP8_DYNAMIC": ("--method", "rtn"),
}

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def model() -> Path:
    return make_demo_model(CACHE / "SmolLM2-135M-Instruct", CACHE / "downloads")


@pytest.fixture(scope="module")
def dataset() -> Path:
    return make_demo_dataset(CACHE / "python-reference.jsonl")


def answer(checkpoint: Path) -> str:
    """The greedy answer of vLLM, in a process of its own interpreter."""
    script = Path(__file__).with_name("vllm_answer.py")
    finished = subprocess.run(
        [VLLM_PYTHON, script, checkpoint, QUESTION], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    reply: str = json.loads(finished.stdout.splitlines()[-1])["answer"]
    return reply


def test_the_original_answers(model: Path) -> None:
    """If this fails, the machine or vLLM's environment is at fault, not the engine."""
    assert "Paris" in answer(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compressed_model_answers(scheme: str, model: Path, dataset: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "compression", model, "--output-dir", tmp_path / scheme),
        *("--scheme", scheme, *SCHEMES[scheme], "--dataset", dataset, "--text-column", "text"),
        *("--num-calibration-samples", "32", "--max-seq-length", "512", "--no-evaluation"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "Paris" in answer(tmp_path / scheme)
