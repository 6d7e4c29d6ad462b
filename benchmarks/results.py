"""Perplexity after compression, Bitmill and LLM Compressor: docs/results.md, cell by cell.

    python -m benchmarks.results [--only PATTERN ...] [--rehearse]

A cell is one compressed model, scored on held-out text, such as small/ours-fp8_dynamic. Those in
build/results are not run again, so this may be stopped and repeated; --only runs those that a pattern matches
(small/*, */ours-*, variants/*). --rehearse makes every cell from next to no data, elsewhere, and prints the
table instead of writing docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import sides, train_small, variants
from benchmarks.console import say
from benchmarks.inputs import GROUP_SIZE, Inputs, Size, prepare, prepare_small
from benchmarks.sides import Modifiers

REHEARSAL = Size(samples=2, length=64, heldout_tokens=2048, steps=2)
OBSERVERS = ("memoryless_mse", "imatrix_mse")
"""The peer's other observers of weights, which these schemes can have beside its default."""
OUR_OBSERVERS = ("gram",)
"""Of our others, those that are compared."""


@dataclass(frozen=True)
class Model:
    """A model that everything is done with. group_size: of int4 weights."""

    title: str
    prepare: Callable[[Path, Size], Inputs]
    group_size: int


@dataclass(frozen=True)
class Row:
    """A line of the table: what each side makes. limit: of the ratio of our best perplexity to the peer's."""

    title: str
    ours: str
    theirs: str
    limit: float


@dataclass(frozen=True)
class Cell:
    """One checkpoint to make and score. side: original, ours or peer; modifiers: its recipe."""

    model: str
    name: str
    side: str
    modifiers: Modifiers


HEAD = """\
# Results

Perplexity of what Bitmill and LLM Compressor (the peer) make of the same model, calibrated on the same
64 x 512 tokens and scored by the same program on 32,768 tokens that neither saw. Lower is better. Both sides
have a column for their default and one for each other observer of weights; the ratio is that of the best of
each. The peer's AWQ does not run without a GPU, so its GPTQ stands in for it. `make results` writes this
file, and [benchmarks/README.md](../benchmarks/README.md) says what was read and how it was scored.
"""
MODELS = {
    "small": Model("small Llama", prepare_small, train_small.GROUP_SIZE),
    "smollm2": Model("SmolLM2-135M", prepare, GROUP_SIZE),
}
ROWS = (
    Row("AWQ W4A16_ASYM", "awq-w4a16_asym", "gptq-w4a16_asym", 1.0),
    Row("AWQ + GPTQ W4A16_ASYM", "awq-gptq-w4a16_asym", "gptq-w4a16_asym", 1.0),
    Row("GPTQ W4A16_ASYM", "gptq-w4a16_asym", "gptq-w4a16_asym", 1.0),
    Row("GPTQ W4A16", "gptq-w4a16", "gptq-w4a16", 1.0),
    Row("SmoothQuant + GPTQ W8A8", "smoothquant-gptq-w8a8", "smoothquant-gptq-w8a8", 1.002),
    Row("FP8_DYNAMIC", "fp8_dynamic", "fp8_dynamic", 1.002),
    Row("SparseGPT 2:4", "sparsegpt-2of4", "sparsegpt-2of4", 1.0),
)


def recipes(group_size: int) -> dict[str, Modifiers]:
    """What there is to compare, in LLM Compressor's words, without observers."""
    linears = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    symmetric = sides.int4(symmetric=True, group_size=group_size)
    asymmetric = sides.int4(symmetric=False, group_size=group_size)
    return {
        "awq-w4a16_asym": {"AWQModifier": asymmetric},
        "awq-gptq-w4a16_asym": {"AWQModifier": {}, "GPTQModifier": asymmetric},
        "gptq-w4a16_asym": {"GPTQModifier": asymmetric},
        "gptq-w4a16": {"GPTQModifier": symmetric},
        "smoothquant-gptq-w8a8": {
            "SmoothQuantModifier": {"smoothing_strength": 0.8},
            "GPTQModifier": {"scheme": "W8A8", **linears},
        },
        "fp8_dynamic": {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", **linears}},
        "sparsegpt-2of4": {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", **linears}},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells to run")
    parser.add_argument("--rehearse", action="store_true", help="from next to no data; figures mean nothing")
    options = parser.parse_args(argv)
    size = REHEARSAL if options.rehearse else Size()
    work = sides.ROOT / "build" / ("results-rehearsal" if options.rehearse else "results")

    @cache
    def inputs(model: str) -> Inputs:
        return MODELS[model].prepare(work / model, size)

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in options.only)

    for cell in cells():
        if wanted(f"{cell.model}/{cell.name}") and _read(work, cell) is None:
            _write(work, cell, inputs(cell.model))
    variants.measure(work, size, wanted)
    text = markdown({(cell.model, cell.name): _read(work, cell) for cell in cells()}, variants.section(work))
    if options.rehearse:
        say("\n" + text)
    else:
        (sides.ROOT / "docs" / "results.md").write_text(text)


def cells() -> Iterator[Cell]:
    """Every cell, ours before the peer's, the peer's defaults before its other observers."""
    for key, model in MODELS.items():
        known = recipes(model.group_size)
        yield Cell(key, "original", "original", {})
        sides_of = (
            ("ours", OUR_OBSERVERS, [row.ours for row in ROWS]),
            ("peer", OBSERVERS, [row.theirs for row in ROWS]),
        )
        for side, observers, names in sides_of:
            for observer in (None, *reversed(observers)):
                for name in dict.fromkeys(names):
                    if observer is None or _observed(known[name]):
                        yield Cell(key, _name(side, name, observer), side, _with(observer, known[name]))


def _name(side: str, recipe: str, observer: str | None) -> str:
    return f"{side}-{recipe}" if observer is None else f"{side}-{recipe}-{observer}"


def _observed(modifiers: Modifiers) -> list[str]:
    """The last of the modifiers, where it finds scales for weights."""
    last = list(modifiers)[-1]
    return [last] if last in ("GPTQModifier", "QuantizationModifier", "AWQModifier") else []


def _with(observer: str | None, modifiers: Modifiers) -> Modifiers:
    if observer is None:
        return modifiers
    chosen = {name: {**modifiers[name], "weight_observer": observer} for name in _observed(modifiers)}
    return {**modifiers, **chosen}


def _file(work: Path, cell: Cell) -> Path:
    return work / cell.model / "cells" / f"{cell.name}.json"


def _read(work: Path, cell: Cell) -> dict[str, Any] | None:
    """A finished cell; None where there is none, or one of another recipe."""
    file = _file(work, cell)
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found["recipe"] == cell.modifiers else None


def _write(work: Path, cell: Cell, inputs: Inputs) -> None:
    """Makes the checkpoint, scores it, keeps the score and drops the checkpoint."""
    file = _file(work, cell)
    file.parent.mkdir(exist_ok=True)
    result: dict[str, Any] = {"recipe": cell.modifiers, "machine": sides.machine()}
    name = f"{cell.model}/{cell.name}"
    if cell.side == "original":
        result["score"] = sides.score(name, inputs.model, inputs)
    else:
        output = file.with_suffix("")
        recipe = sides.write_recipe(file.with_suffix(".yaml"), cell.modifiers)
        if cell.side == "ours":
            command = [*sides.ours(inputs, recipe, output), "--no-evaluation", "--no-self-check"]
        else:
            command = sides.peer(inputs, recipe, output, sides.faster_peer_precision())
        result["run"] = asdict(sides.timed(cell.name, command, file.parent))
        python = Path(sys.executable) if cell.side == "ours" else sides.PEER_PYTHON
        result["versions"] = sides.versions(python)
        result["score"] = sides.score(name, output, inputs)
        shutil.rmtree(output)
    file.write_text(json.dumps(result, indent=2) + "\n")


Results = Mapping[tuple[str, str], dict[str, Any] | None]
"""(model, cell) -> what its file holds."""


def markdown(results: Results, more: Sequence[str]) -> str:
    """docs/results.md. more: lines between the table and what it was made with."""
    columns = ["original", "Bitmill", *OUR_OBSERVERS, "peer", *OBSERVERS, "ratio", "at most"]
    lines = [
        HEAD,
        f"| model | recipe | {' | '.join(columns)} | holds |",
        "| --- | --- |" + " ---: |" * len(columns) + " --- |",
    ]
    for key in MODELS:
        lines += (_line(key, row, results) for row in ROWS)
    return "\n".join([*lines, "", *more, "", *_made_with(results)]) + "\n"


def _line(model: str, row: Row, results: Results) -> str:
    """A row of the table for one model. The best of each side are compared."""
    ours, theirs = (
        [(model, _name(side, recipe, observer)) for observer in (None, *observers)]
        for side, recipe, observers in (("ours", row.ours, OUR_OBSERVERS), ("peer", row.theirs, OBSERVERS))
    )
    figures = [_figure(results[key]) if key in results else "" for key in (*ours, *theirs)]
    ratio, verdict = "", ""
    ours_best, theirs_best = _best(ours, results), _best(theirs, results)
    if ours_best and theirs_best:
        value, error = sides.paired_ratio(ours_best, theirs_best)
        ratio, verdict = f"{value:.4f} ± {error:.4f}", "yes" if value <= row.limit else "**no**"
    cells = [MODELS[model].title, row.title, _figure(results[model, "original"]), *figures]
    return f"| {' | '.join([*cells, ratio, f'{row.limit:g}', verdict])} |"


def _best(keys: Iterable[tuple[str, str]], results: Results) -> dict[str, Any] | None:
    """The score with the lowest perplexity, of the cells that were run."""
    scores = [found["score"] for key in keys if (found := results.get(key))]
    return min(scores, key=lambda score: score["perplexity"], default=None)


def _figure(found: dict[str, Any] | None) -> str:
    return "not run" if found is None else f"{found['score']['perplexity']:.3f}"


def _made_with(results: Results) -> Iterator[str]:
    """The machines and the versions that the cells were made with."""
    done = [each for each in results.values() if each is not None]
    for machine in _distinct(each["machine"] for each in done):
        yield f"Made on {machine['cores']} cores of {machine['cpu']}, Python {machine['python']}."
    for versions in _distinct(each["versions"] for each in done if "versions" in each):
        yield ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "."


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]


if __name__ == "__main__":
    main()
