"""Both sides as whole processes, on the same tokens and recipe file, and the scorer of their results.

A recipe is in LLM Compressor's words, {modifier: fields}, which Bitmill reads as they are.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, Literal

import torch

from benchmarks.console import say
from benchmarks.inputs import Inputs

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"

Modifiers = Mapping[str, Mapping[str, Any]]
PeerPrecision = Literal["stored", "float32"]


@dataclass(frozen=True)
class Run:
    """One process. seconds: wall clock; peak_mb: peak resident set; load: the machine's before the start."""

    name: str
    seconds: float
    peak_mb: float
    load: float


def int4(*, symmetric: bool, group_size: int) -> dict[str, Any]:
    """config_groups of W4A16 or W4A16_ASYM with that group size; LLM Compressor's presets have 128."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
    }
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def write_recipe(path: Path, modifiers: Modifiers) -> Path:
    """Writes a recipe file (JSON is YAML); returns `path`."""
    path.write_text(json.dumps({"default_stage": {"default_modifiers": modifiers}}, indent=2) + "\n")
    return path


def faster_peer_precision() -> PeerPrecision:
    """bfloat16 as stored, but float32 on a processor without bfloat16 arithmetic: many times faster there."""
    return "stored" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def ours(inputs: Inputs, recipe: Path, output: Path) -> list[str]:
    """Bitmill's command: its defaults but for what defines the workload."""
    return [
        *(sys.executable, "-m", "compression", str(inputs.model), "--output-dir", str(output)),
        *("--recipe", str(recipe), "--dataset", str(inputs.dataset), "--text-column", "text"),
        *("--num-calibration-samples", str(inputs.samples), "--max-seq-length", str(inputs.length)),
    ]


def peer(inputs: Inputs, recipe: Path, output: Path, precision: PeerPrecision) -> list[str]:
    """LLM Compressor's command."""
    return [
        *(str(PEER_PYTHON), str(ROOT / "benchmarks" / "peer.py")),
        *(str(inputs.model), str(inputs.calibration), str(recipe), str(output)),
        *(["--float32"] if precision == "float32" else []),
    ]


def timed(name: str, command: list[str], work: Path) -> Run:
    """Runs `command`, whose output folder is work/name; its output goes to work/name.log."""
    shutil.rmtree(work / name, ignore_errors=True)
    load = os.getloadavg()[0]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (work / f"{name}.log").open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{name} failed with exit code {process.returncode}; see {log.name}")
    return Run(name, seconds, usage.ru_maxrss / 1024, load)


def score(name: str, checkpoint: Path, inputs: Inputs) -> dict[str, Any]:
    """What perplexity.py says of a checkpoint on the held-out tokens."""
    scorer = str(ROOT / "benchmarks" / "perplexity.py")
    command = [sys.executable, scorer, str(checkpoint), str(inputs.heldout)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{name} could not be scored:\n{finished.stderr}")
    scored: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    say(f"{name}: perplexity {scored['perplexity']:.3f} on {scored['tokens']} tokens")
    return scored


def paired_ratio(score: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Ratio of two perplexities; standard error from the differences block by block (delta method)."""
    pairs = zip(score["block_means"], other["block_means"], strict=True)
    differences = [left - right for left, right in pairs]
    ratio = score["perplexity"] / other["perplexity"]
    return ratio, ratio * stdev(differences) / len(differences) ** 0.5 if any(differences) else 0.0


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": cpu[0].split(":")[1].strip(), "cores": os.cpu_count(), "python": platform.python_version()}


def versions(python: Path) -> dict[str, str]:
    """What is installed beside that interpreter, of what matters here."""
    code = (
        "import importlib.metadata as m, json;"
        "names = ['bitmill', 'llmcompressor', 'torch', 'transformers', 'compressed-tensors'];"
        "print(json.dumps({d.name.lower(): d.version for d in m.distributions() if d.name.lower() in names}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([str(python), "-c", code]))
    return found
