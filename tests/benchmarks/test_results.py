"""docs/results.md: recipes that Bitmill reads, checkpoints scored as they are served, true ratios."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import perplexity, results
from benchmarks.sides import write_recipe
from compression import Recipe, compress
from compression.checkpoint.formats import decode
from compression.peer_recipe import load_recipe_yaml
from compression.schemes import get_scheme

STEPS = {
    "awq-w4a16_asym": ["awq", "rtn"],
    "awq-gptq-w4a16_asym": ["awq", "gptq"],
    "gptq-w4a16_asym": ["gptq"],
    "gptq-w4a16": ["gptq"],
    "smoothquant-gptq-w8a8": ["smoothquant", "gptq"],
    "fp8_dynamic": ["rtn"],
    "sparsegpt-2of4": ["sparsegpt"],
}


@pytest.mark.parametrize("name", STEPS)
def test_a_recipe_file_is_read_as_it_is_called(name: str, tmp_path: Path) -> None:
    written = write_recipe(tmp_path / "recipe.yaml", results.recipes(64)[name])
    recipe = Recipe.model_validate(load_recipe_yaml(written.read_text()))
    assert [step.type for step in recipe.steps] == STEPS[name]
    assert recipe.representation.lower().replace("sparse_", "") == name.rpartition("-")[2]
    assert all(step.group_size == 64 for step in recipe.quantizing.values() if "w4" in name)


@pytest.mark.parametrize("cell", [each for each in results.cells() if each.name.endswith("-gram")], ids=str)
def test_a_cell_with_our_observer_rounds_with_it(cell: results.Cell, tmp_path: Path) -> None:
    written = write_recipe(tmp_path / "recipe.yaml", cell.modifiers)
    recipe = Recipe.model_validate(load_recipe_yaml(written.read_text()))
    assert {step.observer for step in recipe.quantizing.values()} == {"gram"}


def int8_tokens(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def fp8_tokens(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(
    ("scheme", "activations"),
    [("W4A16", None), ("W4A16_ASYM", None), ("W8A8", int8_tokens), ("FP8_DYNAMIC", fp8_tokens)],
)
@torch.no_grad()
def test_a_checkpoint_is_scored_as_it_is_served(
    scheme: str, activations: Callable[[Tensor], Tensor] | None, tiny_llama: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, Recipe.from_short(scheme, method="rtn", has_dataset=False), tmp_path / "out")
    stored = {
        key: tensor
        for shard in (tmp_path / "out").glob("*.safetensors")
        for key, tensor in load_file(shard).items()
    }
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            dtype = torch.bfloat16 if scheme == "W4A16_ASYM" else torch.float32
            module.weight.copy_(decode(name, stored, get_scheme(scheme), dtype))
            if activations is not None:
                module.register_forward_pre_hook(lambda _module, read: (activations(read[0]),))
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = perplexity.negative_log_likelihoods(perplexity.load(str(tmp_path / "out")), tokens)
    torch.testing.assert_close(
        losses, perplexity.negative_log_likelihoods(dense, tokens), rtol=1e-4, atol=1e-4
    )


def cell(*block_means: float) -> dict[str, Any]:
    mean = sum(block_means) / len(block_means)
    return {
        "score": {"perplexity": float(torch.tensor(mean).exp()), "block_means": list(block_means)},
        "machine": {"cpu": "a processor", "cores": 2, "python": "3.11"},
    }


def test_the_table_compares_the_best_of_both_sides() -> None:
    measured: dict[tuple[str, str], Any] = {(each.model, each.name): None for each in results.cells()}
    measured["small", "ours-gptq-w4a16"] = cell(2.3, 2.2)
    measured["small", "ours-gptq-w4a16-gram"] = cell(2.0, 2.2)
    measured["small", "peer-gptq-w4a16"] = cell(2.3, 2.3)
    measured["small", "peer-gptq-w4a16-imatrix_mse"] = cell(2.0, 2.1)
    measured["small", "ours-fp8_dynamic"] = cell(1.001, 1.001)
    measured["small", "peer-fp8_dynamic"] = cell(1.0, 1.0)
    lines = results.markdown(measured, ["more"]).splitlines()
    gptq, fp8 = (
        next(line for line in lines if line.startswith(f"| small Llama | {name} |"))
        for name in ("GPTQ W4A16", "FP8_DYNAMIC")
    )
    # exp(2.1 - 2.05), and the standard error of the differences 0 and 0.1 is 0.05 of it
    assert gptq.endswith("| 9.488 | 8.166 | 9.974 | not run | 7.768 | 1.0513 ± 0.0526 | 1 | **no** |")
    assert fp8.endswith("| 2.721 | not run | 2.718 | not run | not run | 1.0010 ± 0.0000 | 1.002 | yes |")
