"""vLLM loads what the engine makes of a real model, and answers sensibly: `make test-vllm`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.demo.data import make_demo_dataset
from cli.demo.model import make_demo_model
from tests.conformance.vllm_runs import PASSAGE, ROOT, Run, in_vllm
from tests.support.readers import losses

CACHE = ROOT / ".demo"
"""Where `make demo` keeps the same model, so that it is downloaded once."""

CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is"},
]
DATASET = CACHE / "python-reference.jsonl"
SCHEMES = {
    "W4A16": (
        *("--method", "gptq", "--group-size", "64", "--dataset", DATASET, "--text-column", "text"),
        *("--num-calibration-samples", "32", "--max-seq-length", "512", "--no-evaluation"),
    ),
    "W8A8": ("--method", "rtn"),
    "FP8_DYNAMIC": ("--method", "rtn"),
}

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model and what the engine makes of it, by scheme."""
    model = make_demo_model(CACHE / "SmolLM2-135M-Instruct", CACHE / "downloads")
    make_demo_dataset(DATASET)
    made = {"original": model}
    for scheme, options in SCHEMES.items():
        made[scheme] = tmp_path_factory.mktemp("smollm2") / scheme
        command = [sys.executable, "-m", "compression", model, "--output-dir", made[scheme]]
        subprocess.run([*command, "--scheme", scheme, *options], cwd=ROOT, check=True)
    return made


@pytest.fixture(scope="module")
def run(checkpoints: dict[str, Path]) -> Run:
    return in_vllm(checkpoints, CONVERSATION)


@pytest.mark.parametrize("scheme", ["original", *SCHEMES])
def test_a_model_answers(scheme: str, checkpoints: dict[str, Path], run: Run) -> None:
    """Where the original fails, the machine or vLLM's environment is at fault, not the engine.

    vLLM computes in bfloat16, Transformers in float32: within 0.03 nats, unless vLLM's int8 saturates.
    """
    seen = run.seen[scheme]
    assert not seen.error
    assert "Paris" in seen.answer
    tolerance = 0.3 if scheme == "W8A8" and not run.exact_int8 else 0.03
    expected = float(losses(checkpoints[scheme], PASSAGE).mean())
    assert sum(seen.losses) / len(seen.losses) == pytest.approx(expected, abs=tolerance)
