"""vLLM loads what the engine writes and answers sensibly: `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.demo.data import make_demo_dataset
from cli.demo.model import make_demo_model

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CACHE = ROOT / ".demo"
"""Where `make demo` keeps the same model, so that it is downloaded once."""

CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is"},
]
PASSAGE = (
    "The old mill stood at the end of the village, where the river turned towards the sea. In the winter its "
    "wheel was still, and children from the school came to skate on the pond. Every spring the miller opened "
    "the gates, the water rushed in, and the stones began to turn again. People brought their grain from the "
    "farms in the valley and waited in the yard, talking about the weather and the price of bread."
)

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
def model() -> Path:
    return make_demo_model(CACHE / "SmolLM2-135M-Instruct", CACHE / "downloads")


def in_vllm(checkpoint: Path) -> dict[str, Any]:
    """What vllm_answer.py prints, run by the interpreter that has vLLM."""
    script = Path(__file__).with_name("vllm_answer.py")
    finished = subprocess.run(
        [VLLM_PYTHON, script, checkpoint, json.dumps(CONVERSATION), PASSAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


@torch.no_grad()
def loss_in_transformers(checkpoint: Path) -> float:
    """The passage's mean negative log likelihood, float32, activations quantized as the scheme says."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(checkpoint)(PASSAGE, return_tensors="pt")["input_ids"]
    return float(model(tokens, labels=tokens).loss)


def check(checkpoint: Path, *, int8: bool = False) -> None:
    """vLLM computes in bfloat16, Transformers in float32: within 0.03 nats, unless its int8 saturates."""
    seen = in_vllm(checkpoint)
    assert "Paris" in seen["answer"]
    tolerance = 0.3 if int8 and not seen["exact_int8"] else 0.03
    assert seen["passage_loss"] == pytest.approx(loss_in_transformers(checkpoint), abs=tolerance)


def test_the_original_answers(model: Path) -> None:
    """If this fails, the machine or vLLM's environment is at fault, not the engine."""
    check(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compressed_model_answers(scheme: str, model: Path, tmp_path: Path) -> None:
    make_demo_dataset(DATASET)
    command = [
        *(sys.executable, "-m", "compression", model, "--output-dir", tmp_path / scheme),
        *("--scheme", scheme, *SCHEMES[scheme]),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    check(tmp_path / scheme, int8=scheme == "W8A8")
