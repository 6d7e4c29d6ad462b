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
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import sides
from benchmarks.console import say
from benchmarks.inputs import GROUP_SIZE, prepare
from benchmarks.sides import Run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=sides.ROOT / "build" / "bench")
    faster = sides.faster_peer_precision()
    parser.add_argument("--peer-precision", choices=["stored", "float32"], default=faster)
    parser.add_argument("--without-peer", action="store_true", help="what the evaluation costs, and no more")
    options = parser.parse_args(argv)
    work: Path = options.work.resolve()
    inputs = prepare(work)

    fields = sides.int4(symmetric=True, group_size=GROUP_SIZE)
    recipe = sides.write_recipe(work / "recipe.yaml", {"GPTQModifier": fields})
    fields |= {"weight_observer": "imatrix_mse"}
    best_recipe = sides.write_recipe(work / "recipe-imatrix_mse.yaml", {"GPTQModifier": fields})
    peer = sides.peer(inputs, recipe, work / "peer", options.peer_precision)
    best = sides.peer(inputs, best_recipe, work / "peer-imatrix_mse", options.peer_precision)
    plain = [*sides.ours(inputs, recipe, work / "Bitmill"), "--no-evaluation", "--no-self-check"]
    checked = sides.ours(inputs, recipe, work / "Bitmill-checked")
    runs = []
    for number in range(1, options.rounds + 1):
        commands = {"Bitmill": plain, "Bitmill-checked": checked, "peer": peer}
        if options.without_peer:
            del commands["peer"]
        for name, command in commands.items():
            runs.append(sides.timed(name, command, work))
            say(f"round {number}: {name} {runs[-1].seconds:.1f} s")
    if options.without_peer:
        say("\n" + _evaluation_cost(runs))
        return
    runs.append(sides.timed("peer-imatrix_mse", best, work))
    say(f"peer with imatrix_mse: {runs[-1].seconds:.1f} s")

    checkpoints = {"original": inputs.model}
    checkpoints |= {name: work / name for name in ("Bitmill", "peer", "peer-imatrix_mse")}
    scores = {name: sides.score(name, folder, inputs) for name, folder in checkpoints.items()}
    results = {
        "machine": sides.machine(),
        "versions": {
            "Bitmill": sides.versions(Path(sys.executable)),
            "peer": sides.versions(sides.PEER_PYTHON),
        },
        "peer_precision": options.peer_precision,
        "runs": [asdict(run) for run in runs],
        "scores": scores,
    }
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(runs, scores)
    (work / "results.md").write_text(table)
    say("\n" + table)


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
        ratio, error = sides.paired_ratio(score, best)
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
