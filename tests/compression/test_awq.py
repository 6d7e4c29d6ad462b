"""AWQ: the search against its definition, folds that leave the function alone, and what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compression import (
    AWQModifier,
    CompressionError,
    DatasetSpec,
    QuantizationModifier,
    Recipe,
    compress,
    plan,
)
from compression.data.calibration import load_blocks
from compression.math.awq import DuoScaling, awq_scales
from compression.math.gram import Gram, accumulate_gram
from compression.math.grid import rtn
from compression.math.scaling import Readers, SharedChannels, ToRound
from compression.math.search import search_params
from compression.methods import AWQ_ROWS
from compression.report import Report
from compression.schemes import Observer, QuantizationArgs, get_scheme
from tests.compression.folds import FEW, SMALL, folded_only, planned, with_outliers
from tests.support.interruption import interrupted
from tests.support.models import tiny_model
from tests.support.readers import perplexity

ASYM = {"scheme": "W4A16_ASYM", "group_size": 32}
AWQ: list[dict[str, Any]] = [{"type": "awq", **ASYM}]


def run(source: Path, output: Path, texts: Path, steps: list[dict[str, object]], **options: object) -> Report:
    recipe, dataset = Recipe.model_validate(steps), DatasetSpec(path=str(texts))
    return compress(source, recipe, output, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)


def readers(gram: Gram, part: ToRound, shared: SharedChannels | None = None) -> Readers:
    return Readers([], gram, [part.weight], [part], shared)


def reference_rounding(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Asymmetric round to nearest with min-max scales, float64, group by group."""
    rounded = torch.empty_like(weight)
    assert args.group_size
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], args.group_size):
            part = weight[row, start : start + args.group_size]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = (high - low) / 15
            zero = (-8 - low / scale).round().clamp(-8, 7)
            codes = (part / scale + zero).round().clamp(-8, 7)
            rounded[row, start : start + args.group_size] = (codes - zero) * scale
    return rounded


class TestSearch:
    ARGS = get_scheme("W4A16_ASYM").with_group_size(8).weights

    def problem(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        inputs, weight = torch.randn(200, 16), torch.randn(12, 16)
        inputs[:, [2, 9]] *= 12
        return inputs, weight

    def test_takes_the_best_of_the_grid(self) -> None:
        inputs, weight = self.problem()
        gram = accumulate_gram([inputs])
        scales = awq_scales(readers(gram, ToRound(weight, self.ARGS, torch.float32)), n_grid=10)
        x, w64 = inputs.double().square().mean(0).sqrt(), weight.double()
        magnitude = w64.abs().view(12, 2, 8)
        w = (magnitude / magnitude.amax(-1, keepdim=True)).view(12, 16).mean(0)

        def error(s: Tensor) -> float:
            difference = reference_rounding(w64 * s, self.ARGS) / s - w64
            return float((inputs.double() @ difference.T).square().sum())

        tried = [torch.ones(16, dtype=torch.float64)]
        for step in range(10):
            s = x ** (step / 10) / (w ** (1 - step / 10) + 1e-4)
            tried.append(s / (s.max() * s.min()).sqrt())
        best = min(tried, key=error)
        assert error(best) < 0.7 * error(tried[0])
        torch.testing.assert_close(scales.double(), best, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("observer", ["mse", "imatrix", "gram"])
    def test_scales_are_tried_with_the_observer_on_some_rows(self, observer: Observer) -> None:
        torch.manual_seed(0)
        inputs, weight = torch.randn(200, 16), torch.randn(3 * AWQ_ROWS - 5, 16)
        inputs[:, [2, 9]] *= 12
        gram = accumulate_gram([inputs])
        scales = awq_scales(readers(gram, ToRound(weight, self.ARGS, torch.float32, observer)), n_grid=10)
        x, rows = gram.importance().sqrt(), weight[::3]
        w = (weight.abs() / weight.view(-1, 2, 8).abs().amax(-1).repeat_interleave(8, 1)).mean(0)

        def error(s: Tensor) -> float:
            importance = None if observer == "mse" else gram.importance() / s.square()
            params = search_params(rows * s, self.ARGS, torch.float32, importance=importance)
            difference = rtn(rows * s, self.ARGS, params).dequantize(torch.float32) / s - rows
            return float((inputs @ difference.T).square().sum())

        tried = [torch.ones(16)]
        for step in range(10):
            s = x ** (step / 10) / (w ** (1 - step / 10) + 1e-4)
            tried.append(s / (s.max() * s.min()).sqrt())
        best = min(tried, key=error)
        assert error(best) < 0.9 * error(tried[0])
        torch.testing.assert_close(scales, best, rtol=1e-5, atol=0)

    def test_both_is_no_worse_than_either(self) -> None:
        inputs, weight = self.problem()
        gram = accumulate_gram([inputs])

        def error(duo_scaling: DuoScaling) -> float:
            s = awq_scales(readers(gram, ToRound(weight, self.ARGS, torch.float32)), duo_scaling=duo_scaling)
            difference = reference_rounding((weight * s).double(), self.ARGS) / s - weight
            return float((inputs.double() @ difference.T).square().sum())

        assert error("both") <= min(error(True), error(False)) * (1 + 1e-6)

    def test_channels_that_carry_nothing_are_left_alone(self) -> None:
        inputs, weight = self.problem()
        inputs[:, 4], weight[:, 7] = 0, 0
        gram = accumulate_gram([inputs])
        scales = awq_scales(readers(gram, ToRound(weight, self.ARGS, torch.float32)))
        assert scales.isfinite().all()
        assert (scales[4], scales[7]) == (1, 1)
        assert scales[2] != 1
        nothing = accumulate_gram([torch.zeros(3, 16)])
        assert awq_scales(readers(nothing, ToRound(weight, self.ARGS, torch.float32))).tolist() == [1] * 16

    def test_channels_of_one_row_have_one_scale(self) -> None:
        inputs, weight = self.problem()
        gram = accumulate_gram([inputs])
        shared = SharedChannels(head_dim=4, repeats=2)
        scales = awq_scales(readers(gram, ToRound(weight, self.ARGS, torch.float32), shared=shared))
        heads = scales.view(2, 2, 4)
        assert torch.equal(heads[:, 0], heads[:, 1])
        assert torch.equal(shared.expand(shared.reduce(scales)), scales)
        assert len(scales.unique()) == 8


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("llama", torch.float32),
        ("qwen2", torch.float32),  # v_proj has a bias
        ("phi3", torch.bfloat16),  # q, k and v are one linear, gate and up another
        ("gemma2", torch.float32),  # norms multiply with 1 + w
        ("cohere", torch.float32),  # one norm for attention and MLP
        ("olmo2", torch.bfloat16),  # no norm in front
        ("opt", torch.float32),  # no gate: fc1 stays
    ],
)
def test_folds_leave_the_function_as_it_was(
    model_type: str, dtype: torch.dtype, tiny_texts: Path, tmp_path: Path
) -> None:
    source = with_outliers(tiny_model(tmp_path / "model", model_type, dtype=dtype))
    made = planned(source, tiny_texts, AWQ)
    measured, done = folded_only(made, tiny_texts)
    foldable = {m.group for layer in made.layers for m in layer.modules}
    if model_type in ("olmo2", "opt"):
        left = {"olmo2": ("q_proj", "gate_proj"), "opt": ("fc2",)}[model_type]
        foldable = {group for group in foldable if not group.endswith(left)}
    assert done == foldable
    assert measured.kl_divergence < 1e-7
    assert measured.perplexity_compressed == pytest.approx(measured.perplexity_original, rel=1e-5)


def test_a_wrong_fold_is_undone(tiny_texts: Path, tmp_path: Path) -> None:
    source = with_outliers(tiny_model(tmp_path / "model", dtype=torch.float32))
    made = planned(source, tiny_texts, AWQ)
    layers = []
    for layer in made.layers:
        attention, mlp = layer.linear_folds
        wrong = replace(mlp, linear=mlp.linear.replace("up_proj", "gate_proj"))
        layers.append(replace(layer, linear_folds=(attention, wrong)))
    measured, done = folded_only(replace(made, layers=tuple(layers)), tiny_texts)
    assert not any(group.endswith("down_proj") for group in done)
    assert len(done) == 6
    assert measured.kl_divergence < 1e-7


@pytest.mark.parametrize(("model_type", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float32)])
def test_it_helps_and_reads_back_as_reported(
    model_type: str, dtype: torch.dtype, tiny_texts: Path, tmp_path: Path
) -> None:
    source = with_outliers(tiny_model(tmp_path / "model", model_type, dtype=dtype))
    minmax = {**ASYM, "observer": "minmax"}
    plain = run(source, tmp_path / "plain", tiny_texts, [{"type": "rtn", **minmax}]).evaluation
    report = run(source, tmp_path / "awq", tiny_texts, [{"type": "awq", **minmax}])
    assert plain is not None
    assert report.evaluation is not None
    assert report.evaluation.kl_divergence < 0.5 * plain.kl_divergence
    assert all(row.smoothed for row in report.modules)
    if dtype == torch.float32:
        blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
        expected = report.evaluation.perplexity_compressed
        assert perplexity(tmp_path / "awq", blocks) == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen2", layers=3)
    steps: list[dict[str, object]] = [{"type": "awq", "n_grid": 3}, {"type": "gptq", **ASYM}]

    def begin(output: Path, **options: Any) -> Report:
        return run(source, output, tiny_texts, steps, **options)

    interrupted(begin, tmp_path, layer=1)


class TestRecipe:
    def test_with_a_scheme_it_rounds_to_nearest(self) -> None:
        written = Recipe.model_validate([{"type": "awq", "n_grid": 10, "ignore": ["lm_head"], **ASYM}])
        assert [step.type for step in written.steps] == ["awq", "rtn"]
        apart = [{"type": "AWQModifier", "n_grid": 10}, {"type": "QuantizationModifier", **ASYM}]
        assert Recipe.model_validate(apart).canonical_json() == written.canonical_json()
        short = Recipe.from_short("W4A16_ASYM", method="awq", has_dataset=True, group_size=32)
        assert short == Recipe.model_validate(AWQ)

    def test_offload_device_changes_nothing(self) -> None:
        plain = Recipe(steps=(AWQModifier(), QuantizationModifier(scheme="W4A16")))
        offloaded = Recipe(steps=(AWQModifier(offload_device="cpu"), QuantizationModifier(scheme="W4A16")))
        assert plain.canonical_json() == offloaded.canonical_json()

    def test_offload_device_changes_no_bytes(
        self, tiny_llama: Path, tiny_texts: Path, tmp_path: Path
    ) -> None:
        for name, more in (("plain", {}), ("offloaded", {"offload_device": "cpu"})):
            run(
                tiny_llama,
                tmp_path / name,
                tiny_texts,
                [{"type": "AWQModifier", "n_grid": 3, **ASYM, **more}],
            )
        shards = [path.name for path in (tmp_path / "plain").glob("*.safetensors")]
        assert len(shards) == 3
        for shard in shards:
            assert (tmp_path / "plain" / shard).read_bytes() == (tmp_path / "offloaded" / shard).read_bytes()

    @pytest.mark.parametrize(
        "steps",
        [
            [{"type": "awq"}],
            [{"type": "awq"}, {"type": "magnitude"}],
            [{"type": "smoothquant"}, *AWQ],
            [{"type": "rtn", "scheme": "W4A16"}, {"type": "awq"}],
        ],
    )
    def test_what_makes_no_sense_is_refused(self, steps: list[dict[str, object]]) -> None:
        with pytest.raises(ValidationError, match=r"awq|quantizes"):
            Recipe.model_validate(steps)

    def test_it_needs_data(self, tiny_llama: Path) -> None:
        with pytest.raises(CompressionError) as caught:
            plan(tiny_llama, Recipe.model_validate(AWQ))
        assert caught.value.code == "dataset_required"
