"""Runs on tiny models with experts, all of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress
from compression.report import Report

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
FEW = Evaluation(num_samples=4)
GPTQ: list[dict[str, Any]] = [{"type": "gptq", "scheme": "W4A16", "group_size": 32}]


def run(
    source: Path, output: Path, texts: Path, steps: Sequence[dict[str, Any]] = GPTQ, **options: Any
) -> Report:
    recipe, dataset = Recipe.model_validate(list(steps)), DatasetSpec(path=str(texts))
    return compress(source, recipe, output, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)
