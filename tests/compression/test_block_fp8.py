"""Checkpoints in block FP8, as DeepSeek stores them: compressed as if they had been dequantized before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress, plan
from compression.data.calibration import load_blocks
from compression.report import Report
from tests.compression.plans import problem_of
from tests.support.interruption import interrupted
from tests.support.models import tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
FEW = Evaluation(num_samples=4)
GPTQ = [{"type": "gptq", "scheme": "W4A16", "group_size": 32}]
BLOCK = (128, 128)
Q = "model.layers.0.self_attn.q_proj.weight"
WIDE = {"hidden": 192, "intermediate": 320, "heads": 3, "kv_heads": 1}
"""Rows and columns that end within a block."""


def in_block_fp8(
    source: Path, block: tuple[int, int] = BLOCK, scale_dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """The model in block FP8, beside it the same model stored as what that stands for."""
    fp8, dense = (source.with_name(source.name + suffix) for suffix in ("-fp8", "-dense"))
    for folder in (fp8, dense):
        shutil.copytree(source, folder)
    coded: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight") and "proj_with_mqa" not in name:
            coded[name] = plain[name] = weight
            continue
        rows, columns = weight.shape
        parts = [part.split(block[1], 1) for part in weight.float().split(block[0])]
        scales = torch.tensor([[part.abs().max() / 448 for part in row] for row in parts]).to(scale_dtype)
        spread = torch.kron(scales.float(), torch.ones(block))[:rows, :columns]
        coded[name] = (weight.float() / spread).to(torch.float8_e4m3fn)
        coded[f"{name}_scale_inv"] = scales
        plain[name] = (coded[name].double() * spread.double()).float().to(weight.dtype)
    save_file(coded, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    change_config(fp8, quantization_config=quantization)
    return fp8, dense


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def run(source: Path, output: Path, texts: Path, steps: Any = GPTQ, **options: Any) -> Report:
    recipe, dataset = Recipe.model_validate(steps), DatasetSpec(path=str(texts))
    return compress(source, recipe, output, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)


def assert_same(one: Path, other: Path) -> None:
    """Equal weights, index and config."""
    names = sorted(path.name for path in one.glob("*.safetensors*"))
    assert names == sorted(path.name for path in other.glob("*.safetensors*"))
    for name in [*names, "config.json"]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("model_type", "sizes", "block", "scale_dtype"),
    [
        ("llama", {}, BLOCK, torch.float32),
        ("llama", WIDE, BLOCK, torch.bfloat16),
        ("llama", {}, (64, 32), torch.float32),
        ("deepseek_v3", {}, BLOCK, torch.float32),
    ],
)
def test_the_bytes_are_those_of_the_model_dequantized_before(
    model_type: str,
    sizes: dict[str, int],
    block: tuple[int, int],
    scale_dtype: torch.dtype,
    tiny_texts: Path,
    tmp_path: Path,
) -> None:
    fp8, dense = in_block_fp8(tiny_model(tmp_path / "model", model_type, **sizes), block, scale_dtype)
    from_fp8 = run(fp8, tmp_path / "a", tiny_texts)
    from_dense = run(dense, tmp_path / "b", tiny_texts)
    assert from_fp8.modules == from_dense.modules
    assert from_fp8.evaluation == from_dense.evaluation
    assert_same(tmp_path / "a", tmp_path / "b")
    assert [warning["code"] for warning in from_fp8.warnings] == ["source_dequantized"]
    digests = json.loads((tmp_path / "a" / "bitmill.json").read_text())["provenance"]["resolved"]["model"]
    assert digests.keys() == {"model.safetensors", "config.json"}


@pytest.mark.parametrize(
    "steps",
    [
        [{**GPTQ[0], "ignore": ["lm_head", r"re:.*self_attn", r"re:model\.layers\.1\."]}],
        [{"type": "magnitude", "sparsity": 0.5, "ignore": ["lm_head", r"re:.*self_attn"]}],
    ],
)
def test_what_is_not_compressed_is_written_dequantized(
    steps: Sequence[dict[str, Any]], tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", "deepseek_v3")
    extra = {"model.layers.2.eh_proj.weight": torch.randn(128, 256).bfloat16()}  # predicts further tokens
    tensors = load_file(source / "model.safetensors") | extra
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    fp8, dense = in_block_fp8(source)
    run(fp8, tmp_path / "a", tiny_texts, list(steps))
    run(dense, tmp_path / "b", tiny_texts, list(steps))
    assert_same(tmp_path / "a", tmp_path / "b")
    written = {k: t for path in (tmp_path / "a").glob("*.safetensors") for k, t in load_file(path).items()}
    expected = load_file(dense / "model.safetensors")
    for name in (Q.replace("q_proj", "o_proj"), *extra):
        assert torch.equal(written[name], expected[name]), name
    assert not any(name.endswith("_scale_inv") for name in written)
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in written.values())
    quantization = json.loads((tmp_path / "a" / "config.json").read_text()).get("quantization_config", {})
    assert quantization.get("quant_method") in (None, "compressed-tensors")


def test_the_reported_perplexity_is_that_of_the_published_files(tiny_texts: Path, tmp_path: Path) -> None:
    fp8, dense = in_block_fp8(tiny_model(tmp_path / "model", dtype=torch.float32))
    report = run(fp8, tmp_path / "out", tiny_texts)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), fp8, SMALL, FEW).evaluation
    assert report.evaluation is not None
    assert perplexity(dense, blocks) == pytest.approx(report.evaluation.perplexity_original, rel=1e-6)
    out = perplexity(tmp_path / "out", blocks)
    assert out == pytest.approx(report.evaluation.perplexity_compressed, rel=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_texts: Path, tmp_path: Path) -> None:
    fp8, _ = in_block_fp8(tiny_model(tmp_path / "model"))
    interrupted(lambda output, **options: run(fp8, output, tiny_texts, **options), tmp_path, layer=0)


class TestPlan:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        return in_block_fp8(tiny_model(tmp_path / "model", tokenizer=False))

    def test_weights_count_as_they_are_dequantized(self, folders: tuple[Path, Path]) -> None:
        recipe = Recipe.model_validate([{"type": "rtn", "scheme": "W4A16"}])
        from_fp8, from_dense = (plan(folder, recipe) for folder in folders)
        assert from_fp8.layers == from_dense.layers
        assert from_fp8.kept == from_dense.kept
        assert from_fp8.unknown == ()
        assert from_fp8.memory == from_dense.memory
        assert from_fp8.output_bytes == from_dense.output_bytes
        assert from_fp8.parameters == from_dense.parameters
        assert {module.dtype for layer in from_fp8.layers for module in layer.modules} == {"BF16"}
        assert from_fp8.source_bytes == (folders[0] / "model.safetensors").stat().st_size

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"dtype": None}, "config_invalid"),
            ({"dtype": "float8_e4m3fn"}, "config_invalid"),
            ({"quantization_config": {"quant_method": "fp8"}}, "source_already_quantized"),
            (
                {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
                "source_already_quantized",
            ),
            (
                {
                    "quantization_config": {
                        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static",
                    }
                },
                "source_already_quantized",
            ),
            (
                {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
                "shape_mismatch",
            ),
            ({"quantization_config": {"quant_method": "mxfp4"}}, "source_already_quantized"),
        ],
    )  # fmt: skip
    def test_other_configs_are_refused(
        self, changes: dict[str, Any], code: str, folders: tuple[Path, Path]
    ) -> None:
        change_config(folders[0], **changes)
        assert problem_of(folders[0]).code == code

    @pytest.mark.parametrize(
        ("scales", "code"),
        [
            (None, "checkpoint_incomplete"),
            (torch.ones(2, 1), "shape_mismatch"),
            (torch.ones(2, 2, dtype=torch.int32), "unsupported_dtype"),
        ],
    )
    def test_scales_that_do_not_fit_are_refused(
        self, scales: Tensor | None, code: str, folders: tuple[Path, Path]
    ) -> None:
        self.change(folders[0], f"{Q}_scale_inv", scales)
        problem = problem_of(folders[0])
        assert problem.code == code
        assert Q in problem.message

    def test_scales_without_codes_are_refused(self, folders: tuple[Path, Path]) -> None:
        self.change(folders[0], "model.norm.weight_scale_inv", torch.ones(1, 1))
        assert problem_of(folders[0]).code == "source_already_quantized"

    @staticmethod
    def change(folder: Path, name: str, tensor: Tensor | None) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
