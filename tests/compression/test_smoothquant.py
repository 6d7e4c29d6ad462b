"""SmoothQuant: the formula, the fold, what it is for, and that a run with it resumes to the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression import (
    Calibration,
    CompressionError,
    DatasetSpec,
    Evaluation,
    GPTQModifier,
    Recipe,
    SmoothQuantModifier,
    compress,
    oneshot,
    plan,
)
from compression.math.scaling import fold_norm
from compression.math.smoothquant import smoothing_scales
from compression.model.fold import _to_round
from compression.model.streamed import StreamedModel
from compression.report import Report
from compression.run.verify import check_against_model
from tests.compression import folds
from tests.support.interruption import interrupted
from tests.support.models import tiny_model

AWQ = [{"type": "awq", "scheme": "W4A16"}]
SMOOTH = {"type": "smoothquant", "smoothing_strength": 0.8}
SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
FEW = Evaluation(num_samples=8)


def run(source: Path, output: Path, texts: Path, *steps: dict[str, object], **options: object) -> Report:
    recipe, dataset = Recipe.model_validate(list(steps)), DatasetSpec(path=str(texts))
    return compress(source, recipe, output, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)


def with_outliers(folder: Path) -> Path:
    """Three channels of every norm's result become 30 times larger, as in trained models."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 70, 200]] *= 30
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


class TestScales:
    def test_are_those_of_the_paper(self) -> None:
        torch.manual_seed(0)
        inputs = [torch.randn(2, 5, 6), torch.randn(1, 3, 6)]
        weights = [torch.randn(4, 6), torch.randn(7, 6)]
        expected = []
        for column in range(6):
            x = max(float(t[..., column].abs().max()) for t in inputs)
            w = max(float(t[:, column].abs().max()) for t in weights)
            expected.append(x**0.3 / w**0.7)
        scales = smoothing_scales(inputs, weights, 0.3)
        torch.testing.assert_close(scales.double(), torch.tensor(expected, dtype=torch.float64))

    def test_leave_channels_alone_that_carry_nothing(self) -> None:
        inputs, weight = torch.ones(3, 4), torch.ones(2, 4)
        inputs[:, 1], weight[:, 2] = 0, 0
        assert smoothing_scales([inputs], [weight], 0.5).tolist() == [1, 1, 1, 1]


class TestFold:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("offset", [0, 1])
    def test_norm_times_scales_is_the_norm_that_was(self, dtype: torch.dtype, offset: int) -> None:
        torch.manual_seed(1)
        weight, x = torch.randn(64).to(dtype), torch.randn(10, 64)
        scales = torch.rand(64) * 8 + 0.1
        folded = fold_norm(weight, None, scales, offset=offset)
        assert folded.weight.dtype == dtype
        before = x * (weight.float() + offset)
        after = x * (folded.weight.float() + offset) * folded.scales
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
        if offset == 0:  # 1 + w has fewer digits left where it is small
            torch.testing.assert_close(folded.scales, scales, rtol=0.01, atol=0)

    def test_a_bias_is_divided_too(self) -> None:
        weight, bias, scales = torch.randn(8), torch.randn(8), torch.rand(8) + 0.5
        folded = fold_norm(weight, bias, scales, offset=0)
        assert folded.bias is not None
        torch.testing.assert_close(folded.bias * folded.scales, bias)

    def test_a_factor_that_would_vanish_stays(self) -> None:
        weight = torch.tensor([0.0, 1e-7, 1.0], dtype=torch.float16)
        folded = fold_norm(weight, None, torch.tensor([2.0, 1e5, 2.0]), offset=0)
        assert folded.weight.tolist() == [0.0, weight[1].item(), 0.5]
        assert folded.scales.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("model_type", "left"),
    [
        ("llama", ("o_proj", "down_proj")),
        ("gemma2", ("o_proj", "down_proj")),  # norms multiply with 1 + w
        ("phi3", ("o_proj", "down_proj")),  # q, k and v are one linear, gate and up another
        ("cohere", ("o_proj", "down_proj")),  # LayerNorm, one for attention and MLP
        ("opt", ("out_proj", "fc2")),  # LayerNorm with a bias
    ],
)
def test_folds_leave_the_function_as_it_was(
    model_type: str, left: tuple[str, ...], tiny_texts: Path, tmp_path: Path
) -> None:
    """In float32, all of them made, nothing rounded."""
    source = with_outliers(tiny_model(tmp_path / "model", model_type, dtype=torch.float32))
    made = folds.planned(source, tiny_texts, [SMOOTH, {"type": "rtn", "scheme": "W4A16"}])
    measured, done = folds.folded_only(made, tiny_texts)
    groups = {module.group for layer in made.layers for module in layer.modules}
    assert done == {group for group in groups if not group.endswith(left)}
    assert measured.kl_divergence < 1e-7
    assert measured.perplexity_compressed == pytest.approx(measured.perplexity_original, rel=1e-5)


def test_outliers_in_activations_cost_less(tiny_texts: Path, tmp_path: Path) -> None:
    source = with_outliers(tiny_model(tmp_path / "model"))
    w8a8 = {"type": "rtn", "scheme": "W8A8"}
    plain = run(source, tmp_path / "plain", tiny_texts, w8a8).evaluation
    smooth = run(source, tmp_path / "smooth", tiny_texts, SMOOTH, w8a8).evaluation
    assert plain is not None
    assert smooth is not None
    assert smooth.kl_divergence < 0.5 * plain.kl_divergence


def test_only_norms_all_of_whose_readers_are_compressed_change(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model")
    step = {"type": "rtn", "scheme": "W8A8", "ignore": ["lm_head", "re:.*mlp.*"]}
    report = run(source, tmp_path / "out", tiny_texts, SMOOTH, step)
    assert {row.name.rpartition(".")[2]: row.smoothed for row in report.modules} == {
        "q_proj": True,
        "k_proj": True,
        "v_proj": True,
        "o_proj": False,
    }
    before = load_file(source / "model.safetensors")
    after: dict[str, Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(shard)
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)}
    assert {name for name in changed if "_proj" not in name} == norms


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", layers=3)

    def begin(output: Path, **options: Any) -> Report:
        return run(source, output, tiny_texts, SMOOTH, {"type": "gptq", "scheme": "W8A8"}, **options)

    report = interrupted(begin, tmp_path, layer=1)
    assert sum(row.smoothed for row in report.modules) == 3 * 5


def test_the_names_of_llm_compressor(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model")
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"]),
    ]
    oneshot(
        model=source,
        dataset=str(tiny_texts),
        recipe=recipe,
        output_dir=tmp_path / "theirs",
        max_seq_length=64,
        num_calibration_samples=8,
        evaluation=FEW,
    )
    run(source, tmp_path / "ours", tiny_texts, SMOOTH, {"type": "gptq", "scheme": "W8A8"})
    for shard in (tmp_path / "ours").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "theirs" / shard.name).read_bytes()
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "compressed with SMOOTHQUANT + GPTQ to W8A8" in card
    record = json.loads((tmp_path / "ours" / "bitmill.json").read_text())
    assert [step["type"] for step in record["plan"]["recipe"]["steps"]] == ["smoothquant", "gptq"]


@pytest.mark.parametrize(
    "steps",
    [
        [SMOOTH],
        [{"type": "gptq", "scheme": "W8A8"}, SMOOTH],
        [SMOOTH, SMOOTH, {"type": "rtn", "scheme": "W8A8"}],
    ],
)
def test_recipes_that_make_no_sense(steps: list[dict[str, object]]) -> None:
    with pytest.raises(ValidationError, match=r"smoothquant|quantizes"):
        Recipe.model_validate(steps)


def test_smoothing_needs_data_and_a_norm(tmp_path: Path) -> None:
    recipe = Recipe.model_validate([SMOOTH, {"type": "rtn", "scheme": "FP8_DYNAMIC"}])
    with pytest.raises(CompressionError) as caught:
        plan(tiny_model(tmp_path / "llama"), recipe)
    assert caught.value.code == "dataset_required"
    with pytest.raises(CompressionError) as caught:
        plan(
            tiny_model(tmp_path / "olmo2", "olmo2"),
            recipe,
            dataset=DatasetSpec(texts=("x",)),
            calibration=SMALL,
        )
    assert caught.value.code == "nothing_to_smooth"


def test_a_norm_with_other_readers_is_a_plan_mismatch(tiny_llama: Path) -> None:
    recipe = Recipe.model_validate([SMOOTH, {"type": "rtn", "scheme": "W8A8"}])
    made = plan(tiny_llama, recipe, dataset=DatasetSpec(texts=("x",)), calibration=SMALL)
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.float32)
    check_against_model(made, model)
    (first, second) = made.layers[0].folds.values()
    swapped = replace(made.layers[0], folds={first.group: replace(first, norm=second.norm)})
    with pytest.raises(CompressionError, match="post_attention_layernorm") as caught:
        check_against_model(replace(made, layers=(swapped, made.layers[1])), model)
    assert caught.value.code == "plan_mismatch"


def test_a_fold_that_would_change_the_function_is_not_made(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(weight: Tensor, bias: Tensor | None, scales: Tensor, *, offset: float) -> object:
        return fold_norm(weight, bias, scales, offset=offset)._replace(scales=2 * scales)

    monkeypatch.setattr("compression.model.fold.fold_norm", wrong)
    step = {"type": "rtn", "scheme": "W8A8", "observer": "minmax"}
    report = run(tiny_llama, tmp_path / "out", tiny_texts, SMOOTH, step)
    run(tiny_llama, tmp_path / "plain", tiny_texts, step)
    assert not any(row.smoothed for row in report.modules)
    for shard in (tmp_path / "plain").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


@pytest.mark.parametrize(("steps", "copies"), [([SMOOTH, {"type": "gptq", "scheme": "W8A8"}], 0), (AWQ, 3)])
def test_only_methods_that_try_the_rounding_get_copies_of_the_weights(
    tiny_llama: Path, steps: list[dict[str, object]], copies: int
) -> None:
    made = plan(tiny_llama, Recipe.model_validate(steps), dataset=DatasetSpec(texts=("a",)))
    queries_keys_values = made.layers[0].modules[:3]
    weights = [torch.ones(module.shape) for module in queries_keys_values]
    assert len(_to_round(queries_keys_values, weights, made.recipe)) == copies
