"""vLLM loads what the engine makes of a real model, and answers sensibly: `make test-vllm`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.python_reference import write_python_reference
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
    write_python_reference(DATASET)
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

    vLLM computes in bfloat16. What that makes of the losses is measured in Transformers, against float32;
    vLLM may differ half as much again from token to token, and on average by three standard errors of it.
    Where its int8 saturates, by 0.3 nats on average.
    """
    seen = run.seen[scheme]
    assert not seen.error
    assert "Paris" in seen.answer
    exact = losses(checkpoints[scheme], PASSAGE)
    rounding = rms(losses(checkpoints[scheme], PASSAGE, torch.bfloat16) - exact)
    gaps = torch.tensor(seen.losses) - exact
    if scheme == "W8A8" and not run.exact_int8:
        assert abs(gaps.mean()) < 0.3
    else:
        assert rms(gaps) < 1.5 * rounding
        assert abs(gaps.mean()) < 3 * rounding / len(gaps) ** 0.5


def rms(gaps: torch.Tensor) -> float:
    return float(gaps.square().mean().sqrt())
