"""How long a plan says a run takes, and how much room it takes on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compression import compress
from compression.planning.cost import SPEEDS, Duration
from compression.planning.planner import plan
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from tests.compression.fake_checkpoints import LLAMA_3_8B, TINY, fake_llama
from tests.support.models import tiny_model

DATA = DatasetSpec(texts=("some text",))
GPTQ = [{"type": "gptq", "scheme": "W4A16"}]


def of(folder: Path, steps: list[dict[str, Any]] = GPTQ, **settings: Any) -> Duration:
    settings = {"dataset": DATA, "evaluation": Evaluation(enabled=False), **settings}
    return plan(folder, Recipe.model_validate(steps), **settings).duration


def test_products_of_llama_3_8b_are_those_of_the_formulas(tmp_path: Path) -> None:
    """2 operations a parameter and token, half of the attention's positions; Grams of four inputs, on and
    above the diagonal; error feedback, factors and the report."""
    folder = fake_llama(tmp_path / "model", LLAMA_3_8B)
    few = Calibration(num_calibration_samples=4, max_seq_length=512)
    layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    forward = 2048 * (2 * layer + 2 * 512 * 4096)
    grams = 1.125 * 2048 * (3 * 4096**2 + 14336**2)
    solving = (6144 + 4096 + 28672) * 4096**2 + 4096 * 14336**2
    factors = (3 * 4096**3 + 14336**3) / 3
    expected = 32 * (forward + grams + 5 * solving + factors)
    assert of(folder, calibration=few).operations == pytest.approx(expected)


def test_held_out_text_runs_twice_and_through_lm_head(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model", LLAMA_3_8B)
    few = Calibration(num_calibration_samples=4, max_seq_length=512)
    without = of(folder, calibration=few)
    with_it = of(folder, calibration=few, evaluation=Evaluation(num_samples=2))
    layer = 2 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336) + 2 * 512 * 4096
    expected = 2 * 1024 * (32 * layer + 2 * 128256 * 4096)
    assert with_it.operations - without.operations == pytest.approx(expected)


def test_hidden_states_on_disk_cost_passes_and_bytes(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    in_memory, on_disk = of(folder), of(folder, activation_budget_bytes=0)
    assert on_disk.operations > in_memory.operations
    spilled = 128 * 4 * 512 * 2048
    assert on_disk.bytes - in_memory.bytes == 2 * (2 + 4) * spilled


@pytest.mark.parametrize("steps", [GPTQ, [{"type": "rtn", "scheme": "W4A16", "observer": "minmax"}]])
def test_only_error_feedback_walks_columns(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    made = of(fake_llama(tmp_path / "model"), steps)
    assert made.columns == (2 * (3 * 128 + 256) if steps == GPTQ else 0)


def test_awq_searches(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    few, many = (of(folder, [{"type": "awq", "scheme": "W4A16", "n_grid": n}]) for n in (10, 20))
    assert many.touches > few.touches
    assert many.operations > few.operations


@pytest.mark.parametrize("device_class", SPEEDS)
def test_the_range_is_a_range(tmp_path: Path, device_class: str) -> None:
    made = of(fake_llama(tmp_path / "model", LLAMA_3_8B))
    least, most = made.range(device_class)
    assert 0 < least < most
    shown = made.to_dict()
    assert shown["seconds"][device_class] == {"least": round(least, 1), "most": round(most, 1)}
    assert [item["name"] for item in shown["items"]]


def test_a_run_ends_within_the_range_and_fits_on_the_disk(tiny_texts: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", layers=4, dtype=torch.float32)
    settings: dict[str, Any] = {
        "dataset": DatasetSpec(path=str(tiny_texts)),
        "calibration": Calibration(num_calibration_samples=8, max_seq_length=64),
    }
    recipe = Recipe.model_validate(GPTQ)
    made = plan(folder, recipe, **settings)
    report = compress(folder, recipe, tmp_path / "out", **settings)
    assert report.totals.seconds < made.duration.range("cpu")[1]
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written <= made.disk.bytes
    shown = made.disk.to_dict()
    assert sum(item["bytes"] for item in shown["items"]) == shown["bytes"]
    assert next(item["bytes"] for item in shown["items"] if item["name"] == "weights") == made.output_bytes
    record = json.loads((tmp_path / "out" / "bitmill.json").read_text())
    assert record["plan"]["disk"] == shown


def test_the_scratch_file_is_an_item_of_its_own(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model", TINY)
    recipe = Recipe.model_validate(GPTQ)
    in_memory = plan(folder, recipe, dataset=DATA).disk
    on_disk = plan(folder, recipe, dataset=DATA, activation_budget_bytes=0).disk
    assert [item.name for item in on_disk.items[3:]] == ["hidden states"]
    assert on_disk.bytes - in_memory.bytes == 128 * 4 * 2048 * (512 + 2 * 32)
