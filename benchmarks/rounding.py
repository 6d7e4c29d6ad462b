"""How long rounding without data takes, and how good it is: this checkout, and others beside it.

    python -m benchmarks.rounding MODEL [--checkout FOLDER ...] [--scheme FP8_DYNAMIC ...] [--rounds 3]

Every run is a process of `python -m compression`, of this checkout or of another one, with observer minmax,
which is plain rounding, and with mse, the default without data. Checkouts alternate within a round. Prints
every run's seconds of solving, as it reports them itself, their medians, the mean of |W - W'|^2 / |W|^2 over
the linears, and how many linears lose more than in the checkout that is named first.
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
from statistics import mean, median

from benchmarks import sides
from benchmarks.console import say

SCHEMES = ("FP8_DYNAMIC", "W8A8", "W4A16", "MXFP4A16", "NVFP4A16")
OBSERVERS = ("minmax", "mse")


@dataclass(frozen=True)
class Run:
    """Seconds of solving, and the error of each linear."""

    seconds: float
    errors: Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--checkout", type=Path, action="append", help="the first one is what errors count by"
    )
    parser.add_argument("--scheme", action="append", help=f"by default {', '.join(SCHEMES)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkouts = [folder.resolve() for folder in options.checkout or [sides.ROOT]]
    say("| scheme | checkout | minmax: s | mse: s | medians | ratio | mean error | linears that lose more |")
    say("| --- | --- | --- | --- | --- | ---: | ---: | ---: |")
    for scheme in options.scheme or SCHEMES:
        runs: dict[tuple[Path, str], list[Run]] = {}
        for _ in range(options.rounds):
            for observer in OBSERVERS:
                for checkout in checkouts:
                    run = _run(options.model.resolve(), checkout, scheme, observer)
                    runs.setdefault((checkout, observer), []).append(run)
        for checkout in checkouts:
            say(_line(scheme, checkout, checkouts[0], runs))


def _run(model: Path, checkout: Path, scheme: str, observer: str) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "out")
        command = [sys.executable, "-m", "compression", str(model), "--output-dir", str(output)]
        command += ["--scheme", scheme, "--method", "rtn", "--observer", observer, "--no-self-check"]
        if scheme == "W4A16":
            command += ["--group-size", "auto"]  # 128 does not divide every model's inputs
        subprocess.run(command, cwd=checkout, check=True, capture_output=True)
        report = json.loads((output / "bitmill.json").read_text())["report"]
    return Run(report["phases"]["solve"], {row["name"]: row["weight_error"] for row in report["modules"]})


def _line(scheme: str, checkout: Path, first: Path, runs: Mapping[tuple[Path, str], Sequence[Run]]) -> str:
    plain, searched = ([run.seconds for run in runs[checkout, observer]] for observer in OBSERVERS)
    errors, before = runs[checkout, "mse"][0].errors, runs[first, "mse"][0].errors
    worse = [errors[name] / before[name] - 1 for name in errors if errors[name] > before[name]]
    more = f"{len(worse)} of {len(errors)}" + (f", by {max(worse):.2%} at most" if worse else "")
    listed = (", ".join(f"{seconds:.2f}" for seconds in each) for each in (plain, searched))
    return " | ".join(
        (
            f"| {scheme}",
            checkout.name,
            *listed,
            f"{median(plain):.2f}, {median(searched):.2f}",
            f"{median(searched) / median(plain):.2f}",
            f"{mean(errors.values()):.4e}",
            f"{more} |",
        )
    )


if __name__ == "__main__":
    main()
