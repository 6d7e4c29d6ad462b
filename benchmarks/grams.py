"""Whether what GPTQ is told of its inputs is true: dampening, and reported errors against float64.

    python -m benchmarks.grams MODEL TEXTS.jsonl --samples 4 16 64

Compresses MODEL to W4A16 and, beside the engine, sums each Gram matrix in float64 from the same inputs.
Prints, for each number of calibration samples, how many linears needed more dampening than was asked, and how
far the reported errors are from tr(D G D^T) / tr(W G W^T) in float64. The time of these runs says nothing:
float64 takes most of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from benchmarks.console import say
from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress, pipeline
from compression.math.gram import Gram
from compression.model.activations import LinearGroup


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.grams", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--group-size", type=lambda size: size if size == "auto" else int(size), default="auto"
    )
    options = parser.parse_args()
    for samples in options.samples:
        say(measure(options.model, options.dataset, samples, options.length, options.group_size))


def measure(model: Path, dataset: Path, samples: int, length: int, group_size: int | str) -> str:
    """One run, as a line."""
    references: list[tuple[float | None, float]] = []
    exact: list[Tensor] = []
    group_class, loop = cast(Any, LinearGroup), cast(Any, pipeline)
    gram_of, errors_of = group_class.gram, loop.errors_of

    def gram(group: LinearGroup) -> Gram | None:
        exact.clear()
        exact.append(_float64_gram(group))
        found: Gram | None = gram_of(group)
        return found

    def errors(weight: Tensor, meant: Tensor, matrix: Tensor | None) -> tuple[float, float | None]:
        found: tuple[float, float | None] = errors_of(weight, meant, matrix)
        references.append((found[1], _float64_error(weight, meant, exact[0])))
        return found

    group_class.gram, loop.errors_of = gram, errors
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = compress(
                model,
                Recipe.model_validate([{"type": "gptq", "scheme": "W4A16", "group_size": group_size}]),
                Path(scratch, "out"),
                dataset=DatasetSpec(path=str(dataset)),
                calibration=Calibration(num_calibration_samples=samples, max_seq_length=length),
                evaluation=Evaluation(enabled=False),
                self_check=False,
            )
    finally:
        group_class.gram, loop.errors_of = gram_of, errors_of
    taken = Counter(row.dampening_frac for row in report.modules)
    off = [abs(told - true) / true if told is not None else float("inf") for told, true in references]
    return (
        f"{samples} x {length}: {len(off)} linears, by dampening {dict(taken)}; errors are off by at "
        f"most {max(off):.1e} of themselves; mean error {sum(t or 0 for t, _ in references) / len(off):.5f}"
    )


def _float64_gram(group: LinearGroup) -> Tensor:
    assert group.inputs is not None
    total: Tensor | None = None
    for inputs in group.inputs:
        x = inputs.reshape(-1, inputs.shape[-1]).double()
        total = x.t() @ x if total is None else total.addmm_(x.t(), x)
    assert total is not None
    return total


def _float64_error(weight: Tensor, meant: Tensor, gram: Tensor) -> float:
    exact = weight.double()
    difference = exact - meant.double()
    return float(((difference @ gram) * difference).sum() / ((exact @ gram) * exact).sum())


if __name__ == "__main__":
    main()
