"""Pruning: the masks, SparseGPT against its definition in float64, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from compression import Calibration, CompressionError, DatasetSpec, Evaluation, Recipe, compress, plan
from compression.checkpoint.formats import decode
from compression.data.calibration import load_blocks
from compression.math.gptq import gptq
from compression.math.prune import keep_by_row, keep_in_groups, keep_largest, magnitude_keep, wanda_keep
from compression.math.search import minmax_params
from compression.math.sparsegpt import sparsegpt
from compression.report import Report
from tests.compression.grids import WEIGHTS, correlated_inputs
from tests.support.interruption import interrupted
from tests.support.models import tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
FEW = Evaluation(num_samples=4)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Gram matrix of correlated inputs."""
    x = correlated_inputs(400, columns, seed)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)), x.t() @ x


def loss(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    difference = (weight - pruned).double()
    return float(((difference @ gram.double()) * difference).sum())


def reference(
    weight: Tensor, gram: Tensor, sparsity: float, structure: tuple[int, int] | None, block_size: int
) -> Tensor:
    """Optimal brain surgeon column by column, the last first, an inverse for every column, in float64."""
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))
    inverses = [torch.linalg.inv(hessian[: j + 1, : j + 1]) for j in range(len(gram))]
    costs = torch.stack([1 / inverse[-1, -1] for inverse in inverses])
    current, keep = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    starts = {max(0, stop - block_size): stop for stop in range(len(gram), 0, -block_size)}
    for j in range(len(gram) - 1, -1, -1):
        for start, stop in starts.items():
            if structure is None and j == stop - 1:
                scores = current[:, start:stop] ** 2 * costs[start:stop]
                keep[:, start:stop] = (
                    scores > scores.flatten().sort().values[int(scores.numel() * sparsity) - 1]
                )
        if structure is not None and j % structure[1] == structure[1] - 1:
            group = slice(j - structure[1] + 1, j + 1)
            best = (current[:, group] ** 2 * costs[group]).topk(structure[0]).indices
            keep[:, group] = torch.zeros(len(weight), structure[1], dtype=torch.bool).scatter(1, best, True)
        error = torch.where(keep[:, j], 0.0, current[:, j])
        current[:, : j + 1] -= torch.outer(error / inverses[j][-1, -1], inverses[j][-1])
    return current * keep


class TestMasks:
    def test_n_of_m_in_every_group(self) -> None:
        keep = keep_in_groups(torch.randn(5, 24), (2, 4))
        assert (keep.view(5, 6, 4).sum(-1) == 2).all()
        assert keep_in_groups(torch.tensor([[1.0, 4, 3, 2]]), (2, 4)).tolist() == [[False, True, True, False]]

    def test_ties_do_not_change_how_many_stay(self) -> None:
        assert keep_in_groups(torch.zeros(3, 8), (2, 4)).sum() == 12
        assert keep_largest(torch.zeros(10, 10), 0.3).sum() == 70
        assert (keep_by_row(torch.zeros(4, 10), 0.3).sum(-1) == 7).all()

    def test_magnitude_judges_every_linear_by_itself(self) -> None:
        weight = torch.cat([torch.randn(4, 8), 100 * torch.randn(6, 8)])
        keep = magnitude_keep(weight, 0.5, None, [4, 6])
        assert (keep[:4].sum(), keep[4:].sum()) == (16, 24)
        assert weight[:4].abs()[keep[:4]].min() > weight[:4].abs()[~keep[:4]].max()

    @pytest.mark.parametrize("structure", [None, (2, 4), (1, 4)])
    @pytest.mark.parametrize("method", ["wanda", "magnitude"])
    def test_masks_are_their_definitions(self, method: str, structure: tuple[int, int] | None) -> None:
        """One comparison group after the other, in float64."""
        (weight, _), inputs = problem(12, 40), correlated_inputs(100, 40)
        norms = inputs.double().square().sum(0).sqrt()
        scores = weight.double().abs() * (norms if method == "wanda" else 1.0)
        expected = torch.zeros(12, 40, dtype=torch.bool)
        whole = 40 if method == "wanda" else 12 * 40  # Wanda compares in a row, magnitude in a linear
        size, kept = (whole, whole // 2) if structure is None else (structure[1], structure[0])
        for start in range(0, 12 * 40, size):
            group = scores.flatten()[start : start + size].tolist()
            for position in sorted(range(size), key=group.__getitem__)[size - kept :]:
                expected.view(-1)[start + position] = True
        if method == "wanda":
            keep = wanda_keep(weight, inputs.square().mean(0), 0.5, structure)
        else:
            keep = magnitude_keep(weight, 0.5, structure, [12])
        assert torch.equal(keep, expected)

    def test_wanda_weighs_by_the_norm_of_the_input(self) -> None:
        weight = torch.tensor([[1.0, -2, 3, 4], [4, 3, 2, 1]])
        keep = wanda_keep(weight, torch.tensor([100.0, 1, 1, 0]), 0.5, None)
        assert keep.tolist() == [[True, False, True, False], [True, True, False, False]]


class TestSparseGPT:
    @pytest.mark.parametrize(
        ("structure", "block_size"), [(None, 16), (None, 40), ((2, 4), 128), ((1, 4), 16)]
    )
    def test_is_its_definition(self, structure: tuple[int, int] | None, block_size: int) -> None:
        weight, gram = problem(24, 40)
        expected = reference(weight, gram, 0.5, structure, block_size)
        result = sparsegpt(
            weight, gram, sparsity=0.5, structure=structure, splits=[24], block_size=block_size
        )
        assert torch.equal(result.keep, expected != 0)
        assert (result.weight[~result.keep] == 0).all()
        torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-3)

    def test_errs_less_than_methods_that_do_not_make_up_for_it(self) -> None:
        weight, gram = problem(64, 128)
        importance = gram.diagonal() / 400
        losses = [
            loss(weight, sparsegpt(weight, gram, sparsity=0.5, structure=None, splits=[64]).weight, gram),
            loss(weight, weight * wanda_keep(weight, importance, 0.5, None), gram),
            loss(weight, weight * magnitude_keep(weight, 0.5, None, [64]), gram),
        ]
        assert losses == sorted(losses)

    def test_linears_that_are_stacked_are_pruned_as_much_as_alone(self) -> None:
        weight, gram = problem(30, 32)
        weight[:10] *= 100
        stacked = sparsegpt(weight, gram, sparsity=0.5, structure=None, splits=[10, 20])
        alone = sparsegpt(weight[:10], gram, sparsity=0.5, structure=None, splits=[10])
        assert torch.equal(stacked.keep[:10], alone.keep)
        assert stacked.keep[:10].sum() == 160

    def test_dead_columns_and_one_token(self) -> None:
        x = torch.randn(1, 16)
        x[:, 3] = 0
        result = sparsegpt(torch.randn(4, 16), x.t() @ x, sparsity=0.5, structure=(2, 4), splits=[4])
        assert result.weight.isfinite().all()
        assert (result.weight[:, 3] == 0).all()


@pytest.mark.parametrize("name", ["W4A16-g32", "W4A16_ASYM-g32", "W8A8", "FP8_DYNAMIC"])
def test_gptq_leaves_what_was_pruned_at_zero(name: str) -> None:
    args = WEIGHTS[name].weights
    weight, gram = problem(16, 64)
    keep = keep_in_groups(weight.abs(), (2, 4))
    params = minmax_params(weight * keep, args, torch.float32)
    result = gptq(weight * keep, gram, args, params, keep=keep).weight.dequantize(torch.float32)
    assert (result[~keep] == 0).all()
    everything = gptq(weight, gram, args, params, keep=torch.ones_like(keep)).weight
    assert torch.equal(everything.codes, gptq(weight, gram, args, params).weight.codes)


def run(source: Path, output: Path, texts: Path | None, recipe: Recipe, **options: Any) -> Report:
    dataset = None if texts is None else DatasetSpec(path=str(texts))
    return compress(source, recipe, output, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)


def written(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for shard in folder.glob("*.safetensors") for key, tensor in load_file(shard).items()}


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("scheme", ["SPARSE_50", "SPARSE_2OF4"])
def test_a_pruned_model_is_a_plain_checkpoint(
    method: str, scheme: str, tiny_texts: Path, tmp_path: Path
) -> None:
    source, out = tiny_model(tmp_path / "model", dtype=torch.float32), tmp_path / "out"
    report = run(source, out, tiny_texts, Recipe.from_short(scheme, method=method, has_dataset=True))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    before, after = load_file(source / "model.safetensors"), written(out)
    assert before.keys() == after.keys()
    for row in report.modules:
        weight = after[f"{row.name}.weight"]
        assert weight.dtype == torch.float32
        assert abs(float((weight == 0).float().mean()) - 0.5) <= 1e-3
        assert row.sparsity == pytest.approx(0.5, abs=1e-3)
        assert (row.method, row.scheme) == (method, None)
        if scheme == "SPARSE_2OF4":
            assert ((weight.view(-1, 4) == 0).sum(-1) == 2).all()
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
    assert report.evaluation is not None
    assert perplexity(out, blocks) == pytest.approx(report.evaluation.perplexity_compressed, rel=1e-6)
    assert [warning["code"] for warning in report.warnings] == ["pruned_stored_dense"]


RECIPES = [
    ("sparsegpt", "gptq", "W4A16"),
    ("sparsegpt", "gptq", "W4A16_ASYM"),
    ("sparsegpt", "gptq", "W8A8"),
    ("sparsegpt", "gptq", "FP8_DYNAMIC"),
    ("sparsegpt", "gptq", "NVFP4A16"),
    ("sparsegpt", "rtn", "W4A16"),
    ("sparsegpt", "rtn", "W4A16_ASYM"),
    ("sparsegpt", "rtn", "W8A8"),
    ("sparsegpt", "rtn", "FP8_DYNAMIC"),
    ("sparsegpt", "rtn", "MXFP8A16"),
    ("wanda", "gptq", "W4A16_ASYM"),
    ("wanda", "rtn", "W4A16_ASYM"),
    ("wanda", "rtn", "FP8_DYNAMIC"),
    ("magnitude", "gptq", "W8A8"),
    ("magnitude", "rtn", "FP8_BLOCK"),
]


Taken = Callable[[str, str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory, tiny_texts: Path) -> Taken:
    """Which weights of the first q, k and v are pruned, by method and structure: what these read does not
    depend on what was compressed before."""
    folder = tmp_path_factory.mktemp("pruned")
    source = tiny_model(folder / "model", dtype=torch.float32)

    @cache
    def pruned(method: str, structure: str) -> dict[str, Tensor]:
        out = folder / f"{method}-{structure}".replace(":", "")
        run(source, out, tiny_texts, Recipe.model_validate([{"type": method, "mask_structure": structure}]))
        names = [f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
        tensors = written(out)
        return {name: tensors[f"{name}.weight"] == 0 for name in names}

    return pruned


@pytest.mark.parametrize(("pruning", "method", "scheme"), RECIPES)
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_what_pruning_left_is_quantized_and_what_it_took_stays_away(
    pruning: str, method: str, scheme: str, structure: str, taken: Taken, tiny_texts: Path, tmp_path: Path
) -> None:
    source, out = tiny_model(tmp_path / "model", dtype=torch.float32), tmp_path / "out"
    prune, quantize = {"type": pruning, "mask_structure": structure}, {"type": method, "scheme": scheme}
    recipe = Recipe.model_validate([prune, quantize])
    report = run(source, out, tiny_texts, recipe)
    tensors, pruned = written(out), taken(pruning, structure)
    made = plan(source, recipe, dataset=DatasetSpec(path=str(tiny_texts)), calibration=SMALL)
    modules = [module for layer in made.layers for module in layer.modules]
    assert len(modules) == len(report.modules) == 14
    for module, row in zip(modules, report.modules, strict=True):
        zeros = decode(module.name, tensors, module.scheme, torch.float32) == 0  # by compressed-tensors
        assert zeros.float().mean() >= 0.5 - 1e-3
        assert row.sparsity == pytest.approx(float(zeros.float().mean()))
        if structure == "2:4":
            assert (zeros.view(-1, 4).sum(-1) >= 2).all()
        if module.name in pruned:
            assert abs(float(pruned[module.name].float().mean()) - 0.5) <= 1e-3
            assert zeros[pruned[module.name]].all()
    assert {row.method for row in report.modules} == {f"{pruning}+{method}"}
    assert report.evaluation is not None
    if scheme != "W4A16_ASYM":  # Transformers loads it only dequantized: tests/support/readers.py
        blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
        assert perplexity(out, blocks) == pytest.approx(report.evaluation.perplexity_compressed, rel=1e-6)


def test_pruned_and_quantized_linears_can_be_different_ones(tiny_texts: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        [
            {"type": "wanda", "sparsity": 0.3, "targets": ["re:.*mlp.*"]},
            {"type": "rtn", "scheme": "W8A8", "targets": ["re:.*self_attn.*"], "ignore": []},
        ]
    )
    report = run(tiny_model(tmp_path / "model"), tmp_path / "out", tiny_texts, recipe)
    kinds = {("mlp" in row.name, row.method, row.scheme) for row in report.modules}
    assert kinds == {(True, "wanda", None), (False, "rtn", "W8A8")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name.split(".")[3] for name in config["ignore"] if name != "lm_head"} == {"mlp"}
    assert all(row.sparsity == pytest.approx(0.3, abs=2e-3) for row in report.modules if row.scheme is None)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", layers=3)
    recipe = Recipe.model_validate([{"type": "sparsegpt"}, {"type": "gptq", "scheme": "W4A16"}])

    def begin(output: Path, **options: Any) -> Report:
        return run(source, output, tiny_texts, recipe, **options)

    interrupted(begin, tmp_path, layer=1)


def test_magnitude_needs_no_data(tmp_path: Path) -> None:
    recipe = Recipe.from_short("SPARSE_2OF4", has_dataset=False)
    report = run(tiny_model(tmp_path / "model"), tmp_path / "out", None, recipe)
    assert {row.method for row in report.modules} == {"magnitude"}


W8A8 = {"type": "rtn", "scheme": "W8A8"}


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([W8A8, {"type": "sparsegpt"}], "before"),
        ([{"type": "sparsegpt", "mask_structure": "4:2"}], "mask_structure"),
        ([{"type": "sparsegpt", "mask_structure": "2:4", "sparsity": 0.6}], "sparsity of 0.5"),
        ([{"type": "sparsegpt", "sparsity": 1}], "less than 1"),
    ],
)
def test_recipes_that_make_no_sense(steps: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(steps)


def test_llm_compressors_way_to_write_it() -> None:
    theirs = {"type": "SparseGPTModifier", "sparsity": 0.5, "mask_structure": "0:0"}
    assert Recipe.model_validate([theirs]) == Recipe.model_validate([{"type": "sparsegpt"}])


def test_what_a_plan_refuses(tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as caught:
        plan(
            tiny_model(tmp_path / "model"), Recipe.from_short("SPARSE_50", method="wanda", has_dataset=False)
        )
    assert caught.value.code == "dataset_required"
    odd = tiny_model(tmp_path / "odd", intermediate=510)
    with pytest.raises(CompressionError) as caught:
        plan(odd, Recipe.from_short("SPARSE_2OF4", has_dataset=False))
    assert caught.value.code == "mask_structure_does_not_divide"
    assert "510" in caught.value.message
