"""The estimate grows with what really is held, and not with the model's depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compression.memory import CUDA_CONTEXT_BYTES, MemoryEstimate
from compression.planning import plan
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from tests.compression.fake_checkpoints import LLAMA_3_8B, TINY, fake_llama

DATA = DatasetSpec(texts=("some text",))


def estimate(
    folder: Path,
    config: Mapping[str, Any] = TINY,
    *,
    samples: int = 16,
    held_out: int | None = None,
    data: bool = True,
) -> MemoryEstimate:
    return plan(
        fake_llama(folder, config),
        Recipe.from_short("W4A16", has_dataset=data),
        dataset=DATA if data else None,
        calibration=Calibration(num_calibration_samples=samples, max_seq_length=512),
        evaluation=Evaluation(enabled=held_out is not None, num_samples=held_out),
    ).memory


def item(memory: MemoryEstimate, name: str) -> int:
    return next(item.bytes for item in memory.items if item.name == name)


def test_depth_does_not_matter(tmp_path: Path) -> None:
    shallow = estimate(tmp_path / "a", {**TINY, "num_hidden_layers": 2})
    deep = estimate(tmp_path / "b", {**TINY, "num_hidden_layers": 20})
    assert shallow == deep


def test_parked_activations_are_counted_from_their_shapes(tmp_path: Path) -> None:
    """Residual and normed state, and the widest beside them: q, k, v and the attention's result; float32."""
    memory = estimate(tmp_path / "model", samples=16, held_out=3)
    width = 2 * 128 + max(256, 128 + 64 + 64 + 128)
    assert item(memory, "parked calibration") == 16 * 512 * width * 4
    assert item(memory, "parked evaluation") == 2 * 3 * 512 * width * 4


def test_the_gram_matrix_belongs_to_the_widest_input(tmp_path: Path) -> None:
    assert item(estimate(tmp_path / "model", LLAMA_3_8B), "Gram matrix") == 3 * 4 * 14336**2


def test_a_layer_of_llama_3_8b(tmp_path: Path) -> None:
    """0.436 GB in bf16; twice while original and compressed run side by side."""
    alone = item(estimate(tmp_path / "a", LLAMA_3_8B), "layer")
    assert round(alone / 1e9, 3) == 0.436
    assert item(estimate(tmp_path / "b", LLAMA_3_8B, held_out=1), "layer") == 2 * alone


def test_without_data_nothing_is_parked(tmp_path: Path) -> None:
    names = {item.name for item in estimate(tmp_path / "model", data=False).items}
    assert not names & {"parked calibration", "parked evaluation", "Gram matrix", "logits", "running batch"}


def test_the_peak_is_that_of_the_fullest_phase(tmp_path: Path) -> None:
    memory = estimate(tmp_path / "model", held_out=2)
    sums = [
        sum(item.bytes for item in memory.items if phase in item.phases)
        for phase in ("solve", "forward", "compare")
    ]
    assert memory.host_bytes == max(sums)
    shown = memory.to_dict()
    assert shown["host_bytes"] == memory.host_bytes
    assert [item["name"] for item in shown["items"]] == [item.name for item in memory.items]
    assert all(item["basis"] for item in shown["items"])


def test_the_process_itself_is_not_on_the_gpu(tmp_path: Path) -> None:
    memory = estimate(tmp_path / "model", LLAMA_3_8B)
    assert memory.gpu_bytes == memory.host_bytes - item(memory, "process") + CUDA_CONTEXT_BYTES


@pytest.mark.parametrize("change", [{"samples": 512}, {"held_out": 256}])
def test_more_data_takes_more(tmp_path: Path, change: dict[str, int]) -> None:
    less = estimate(tmp_path / "a", **{"samples": 16, "held_out": 2})
    more = estimate(tmp_path / "b", **{"samples": 16, "held_out": 2} | change)
    assert more.host_bytes > less.host_bytes
