"""GPTQ W4A16, Bitmill and LLM Compressor side by side: whole processes, the same tokens, the same scorer.

    python -m benchmarks [--rounds 3] [--work FOLDER] [--peer-precision stored|float32] [--without-peer]

Each round runs Bitmill, Bitmill with its evaluation and self-check on, which the peer does not have, and the
peer with its default observer; all are timed from exec to exit, and ratios are taken within a round, so that
a machine that gets slower does not tilt them. The peer runs once more with imatrix_mse, its most accurate
observer, whose time is listed and whose perplexity is the one to beat. On a processor without bfloat16
arithmetic the peer is told to load the model in float32 unless --peer-precision says otherwise: that is many
times faster there. Writes results.json and results.md into FOLDER. benchmarks/README.md says what the figures
mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch

from benchmarks.inputs import GROUP_SIZE, Inputs, prepare

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"


@dataclass(frozen=True)
class Run:
    """One process. seconds: wall clock; peak_mb: peak resident set; load: the machine's before the start."""

    name: str
    seconds: float
    peak_mb: float
    load: float


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    faster = "stored" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    parser.add_argument("--peer-precision", choices=["stored", "float32"], default=faster)
    parser.add_argument("--without-peer", action="store_true", help="what the evaluation costs, and no more")
    options = parser.parse_args(argv)
    work: Path = options.work.resolve()
    inputs = prepare(work)

    peer, best = (_peer(inputs, work, observer, options.peer_precision) for observer in (None, "imatrix_mse"))
    plain = [*_ours(inputs, work / "Bitmill"), "--no-evaluation", "--no-self-check"]
    checked = _ours(inputs, work / "Bitmill-checked")
    runs = []
    for number in range(1, options.rounds + 1):
        commands = {"Bitmill": plain, "Bitmill-checked": checked, "peer": peer}
        if options.without_peer:
            del commands["peer"]
        for name, command in commands.items():
            runs.append(_timed(name, command, work))
            _say(f"round {number}: {name} {runs[-1].seconds:.1f} s")
    if options.without_peer:
        _say("\n" + _evaluation_cost(runs))
        return
    runs.append(_timed("peer-imatrix_mse", best, work))
    _say(f"peer with imatrix_mse: {runs[-1].seconds:.1f} s")

    checkpoints = {"original": inputs.model}
    checkpoints |= {name: work / name for name in ("Bitmill", "peer", "peer-imatrix_mse")}
    scores = {name: _score(name, folder, inputs) for name, folder in checkpoints.items()}
    results = {
        "machine": _machine(),
        "versions": {"Bitmill": _versions(sys.executable), "peer": _versions(str(PEER_PYTHON))},
        "peer_precision": options.peer_precision,
        "runs": [asdict(run) for run in runs],
        "scores": scores,
    }
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(runs, scores)
    (work / "results.md").write_text(table)
    _say("\n" + table)


def markdown(runs: list[Run], scores: dict[str, dict[str, Any]]) -> str:
    """Every run, the medians and their ratio, and the perplexities."""
    lines = ["| run | seconds | peak RSS, MB | load before |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {r.name} | {r.seconds:.1f} | {r.peak_mb:.0f} | {r.load:.1f} |" for r in runs]
    ratios = _ratios(runs, "Bitmill", "peer")
    listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    lines += ["", f"Bitmill / peer: {listed}; median {median(ratios):.3f}.", "", _evaluation_cost(runs), ""]
    lines += ["| checkpoint | perplexity | ratio to the peer with imatrix_mse |", "| --- | ---: | ---: |"]
    best = scores["peer-imatrix_mse"]
    for name, score in scores.items():
        ratio, error = _paired_ratio(score, best)
        lines.append(f"| {name} | {score['perplexity']:.3f} | {ratio:.4f} ± {error:.4f} |")
    return "\n".join(lines) + "\n"


def _ratios(runs: list[Run], name: str, other: str) -> list[float]:
    """Seconds of one to seconds of the other, round by round."""
    ours, theirs = ([run.seconds for run in runs if run.name == wanted] for wanted in (name, other))
    return [left / right for left, right in zip(ours, theirs, strict=True)]


def _evaluation_cost(runs: list[Run]) -> str:
    more = [ratio - 1 for ratio in _ratios(runs, "Bitmill-checked", "Bitmill")]
    listed = ", ".join(f"{share:.1%}" for share in more)
    return f"Evaluation and self-check: {listed} more; median {median(more):.1%}."


def _paired_ratio(score: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Ratio of two perplexities; standard error from the differences block by block (delta method)."""
    pairs = zip(score["block_means"], other["block_means"], strict=True)
    differences = [left - right for left, right in pairs]
    ratio = score["perplexity"] / other["perplexity"]
    return ratio, ratio * stdev(differences) / len(differences) ** 0.5 if any(differences) else 0.0


def _ours(inputs: Inputs, output: Path) -> list[str]:
    """Defaults but for what defines the workload."""
    return [
        *(sys.executable, "-m", "compression", str(inputs.model), "--output-dir", str(output)),
        *("--scheme", "W4A16", "--method", "gptq", "--group-size", str(GROUP_SIZE)),
        *("--dataset", str(inputs.dataset), "--text-column", "text"),
        *("--num-calibration-samples", str(inputs.samples), "--max-seq-length", str(inputs.length)),
    ]


def _peer(inputs: Inputs, work: Path, observer: str | None, precision: str) -> list[str]:
    return [
        *(str(PEER_PYTHON), str(ROOT / "benchmarks" / "peer_gptq.py"), str(inputs.model)),
        *(str(inputs.calibration), str(work / ("peer" if observer is None else f"peer-{observer}"))),
        *([] if observer is None else ["--observer", observer]),
        *(["--float32"] if precision == "float32" else []),
    ]


def _timed(name: str, command: list[str], work: Path) -> Run:
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


def _score(name: str, checkpoint: Path, inputs: Inputs) -> dict[str, Any]:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "perplexity.py"),
        str(checkpoint),
        str(inputs.heldout),
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{name} could not be scored:\n{finished.stderr}")
    score: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    _say(f"{name}: perplexity {score['perplexity']:.3f} on {score['tokens']} tokens")
    return score


def _machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": cpu[0].split(":")[1].strip(), "cores": os.cpu_count(), "python": platform.python_version()}


def _versions(python: str) -> dict[str, str]:
    """What is installed beside that interpreter, of what matters here."""
    code = (
        "import importlib.metadata as m, json;"
        "names = ['bitmill', 'llmcompressor', 'torch', 'transformers', 'compressed-tensors'];"
        "print(json.dumps({d.name.lower(): d.version for d in m.distributions() if d.name.lower() in names}))"
    )
    versions: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code]))
    return versions


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
