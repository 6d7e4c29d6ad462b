"""Peak memory of whole engine processes, on random models: VmHWM.

    python -m benchmarks.memory FOLDER                two depths of a Llama: it does not grow (8 GB of models)
    python -m benchmarks.memory FOLDER --estimates    many methods, beside what the plan says (2 GB of models)

Models are made in FOLDER, or found there. Prints a line for every run, and a table at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.python_reference import write_python_reference
from benchmarks.random_llama import make
from compression.machine.arithmetic import DTYPES
from compression.planning.memory import ACTIVATION_BUDGET_BYTES, estimate
from compression.planning.planner import plan
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe

DEPTHS = (24, 48)
LENGTH, HELD_OUT = 512, 4
SIZES = {"hidden": 2048, "intermediate": 5632, "vocab": 32_000, "kv_heads": 4}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"layers": 2},
    "dense, float32": {"layers": 2, "dtype": "float32"},
    "8 experts": {"layers": 2, "intermediate": 1408, "experts": 8},
}

console = Console()


@dataclass(frozen=True)
class Run:
    """One compression. model: of MODELS; samples: of LENGTH tokens."""

    name: str
    steps: Sequence[Mapping[str, Any]]
    model: str = "dense"
    samples: int = 16
    budget_bytes: int = ACTIVATION_BUDGET_BYTES

    @property
    def recipe(self) -> Recipe:
        return Recipe.model_validate({"steps": list(self.steps)})


@dataclass(frozen=True)
class Peak:
    """bytes: VmHWM of the process. seconds: by its own clock. itemsize: of the numbers it computed in."""

    bytes: int
    seconds: float
    itemsize: int


RTN = Run("RTN W4A16", [{"type": "rtn", "scheme": "W4A16", "observer": "minmax"}], samples=4)
GPTQ_STEP = {"type": "gptq", "scheme": "W4A16"}
GPTQ = Run("GPTQ W4A16", [GPTQ_STEP])
ESTIMATED = (
    RTN,
    GPTQ,
    Run("GPTQ W4A16", [GPTQ_STEP], "dense, float32"),
    Run("GPTQ W4A16, hidden states on disk", [GPTQ_STEP], samples=64, budget_bytes=64 << 20),
    Run("AWQ W4A16", [{"type": "awq", "scheme": "W4A16"}]),
    Run("SmoothQuant, GPTQ W8A8", [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}]),
    Run("SparseGPT 2:4", [{"type": "sparsegpt", "mask_structure": "2:4"}]),
    Run("GPTQ W4A16", [GPTQ_STEP], "8 experts"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--estimates", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = options.folder / "topics.jsonl"
    if not texts.exists():
        write_python_reference(texts)
    if options.estimates:
        compare_with_estimates(options.folder, texts)
    else:
        compare_depths(options.folder, texts)


def compare_depths(folder: Path, texts: Path) -> None:
    """The same jobs on a model, and on one that is twice as deep."""
    peaks = {}
    for depth in DEPTHS:
        model = made(folder / f"llama{depth}", layers=depth)
        for job in (RTN, GPTQ):
            peaks[job.name, depth] = run(job, model, texts).bytes
            console.print(f"{job.name}, {depth} layers: {peaks[job.name, depth] / 1e9:.3f} GB")
    console.print(
        "\n| run | " + " | ".join(f"{depth} layers" for depth in DEPTHS) + " | deeper / shallower |"
    )
    console.print("| --- | --- | --- | --- |")
    for job in (RTN, GPTQ):
        shallow, deep = (peaks[job.name, depth] for depth in DEPTHS)
        console.print(f"| {job.name} | {shallow / 1e9:.3f} GB | {deep / 1e9:.3f} GB | {deep / shallow:.3f} |")


def compare_with_estimates(folder: Path, texts: Path) -> None:
    """Jobs of every kind, each beside what its plan says of memory and time."""
    rows = []
    for job in ESTIMATED:
        model = made(folder / job.model.replace(", ", "-").replace(" ", "-"), **MODELS[job.model])
        peak = run(job, model, texts)
        planned = plan(
            model,
            job.recipe,
            dataset=DatasetSpec(path=str(texts), text_column="text"),
            calibration=Calibration(num_calibration_samples=job.samples, max_seq_length=LENGTH),
            evaluation=Evaluation(num_samples=HELD_OUT),
            activation_budget_bytes=job.budget_bytes,
        )
        meant = estimate(planned.workload, peak.itemsize).host_bytes
        least, most = planned.duration.range("cpu")
        rows.append(
            f"| {job.name} | {job.model} | {8 * peak.itemsize} bits | {meant / 1e9:.3f} GB "
            f"| {peak.bytes / 1e9:.3f} GB | {meant / peak.bytes:.3f} | {least:.0f} to {most:.0f} s "
            f"| {peak.seconds:.0f} s |"
        )
        console.print(rows[-1])
    console.print("\n| run | model | computed in | estimate | measured | ratio | planned | took |")
    console.print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        console.print(row)


def made(folder: Path, **sizes: Any) -> Path:
    """The folder of a random model, made where it is not there yet."""
    return folder if folder.exists() else make(folder, **{**SIZES, **sizes})


def run(job: Run, model: Path, texts: Path) -> Peak:
    """One process that compresses `model`."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(job.recipe.model_dump(mode="json")))
        command = [sys.executable, "-m", "compression", str(model), "--recipe", str(recipe)]
        command += ["--dataset", str(texts), "--text-column", "text", "--max-seq-length", str(LENGTH)]
        command += ["--num-calibration-samples", str(job.samples), "--num-evaluation-samples", str(HELD_OUT)]
        command += ["--activation-budget-bytes", str(job.budget_bytes), "--output-dir", f"{scratch}/out"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        record = json.loads((Path(scratch) / "out" / "bitmill.json").read_text())
    summary = json.loads(done.stdout)
    dtype = record["provenance"]["resolved"]["arithmetic"]["compute_dtype"]
    return Peak(summary["peak_host_bytes"], summary["totals"]["seconds"], DTYPES[dtype].itemsize)


if __name__ == "__main__":
    main()
