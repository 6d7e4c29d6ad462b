"""Peak memory of whole engine processes, on random Llamas that differ in depth only.

    python -m benchmarks.memory FOLDER     makes the models in FOLDER (8 GB), or finds them there

Prints a line for every run, and a table at the end. The peak is the process's VmHWM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.random_llama import make
from cli.demo.data import make_demo_dataset

DEPTHS = (24, 48)
RUNS = {
    "RTN W4A16": ["--method", "rtn", "--observer", "minmax", "--num-calibration-samples", "4"],
    "GPTQ W4A16": ["--method", "gptq", "--num-calibration-samples", "16"],
}
LENGTH, HELD_OUT = "512", "4"

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = folder / "topics.jsonl"
    if not texts.exists():
        make_demo_dataset(texts)
    peaks = {}
    for depth in DEPTHS:
        model = folder / f"llama{depth}"
        if not model.exists():
            make(model, layers=depth, hidden=2048, intermediate=5632, vocab=32_000, kv_heads=4)
        for name, options in RUNS.items():
            peaks[name, depth] = run(model, texts, options)
            console.print(f"{name}, {depth} layers: {peaks[name, depth] / 1e9:.3f} GB")
    console.print(
        "\n| run | " + " | ".join(f"{depth} layers" for depth in DEPTHS) + " | deeper / shallower |"
    )
    console.print("| --- | --- | --- | --- |")
    for name in RUNS:
        shallow, deep = (peaks[name, depth] for depth in DEPTHS)
        console.print(f"| {name} | {shallow / 1e9:.3f} GB | {deep / 1e9:.3f} GB | {deep / shallow:.3f} |")


def run(model: Path, texts: Path, options: list[str]) -> int:
    """Bytes at the peak of one process that compresses `model`."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        command = [sys.executable, "-m", "compression", str(model), "--scheme", "W4A16", *options]
        command += ["--dataset", str(texts), "--text-column", "text", "--max-seq-length", LENGTH]
        command += ["--num-evaluation-samples", HELD_OUT, "--output-dir", f"{scratch}/out"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    summary: dict[str, int] = json.loads(done.stdout)
    return summary["peak_host_bytes"]


if __name__ == "__main__":
    main()
