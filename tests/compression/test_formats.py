"""What is written is what readers decompress, bit by bit, and the config is what readers parse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from compression.checkpoint.formats import decode, encode
from compression.math.grid import QuantizationParams, QuantizedWeight, code_dtype, fixed_input_scale, rtn
from compression.math.search import minmax_params
from compression.planning.planner import plan
from compression.planning.shards import stored_tensors
from compression.recipe import DatasetSpec, Recipe
from compression.run.config import quantization_config
from compression.schemes import SCHEMES, Scheme, get_scheme
from tests.compression.fake_checkpoints import fake_llama
from tests.compression.grids import SCALE_DTYPES, WEIGHTS, all_codes

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip


def quantized(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight[0] = 0.0
    weight[1] *= 1e-6
    return rtn(weight, scheme.weights, minmax_params(weight, scheme.weights, dtype))


def fixed_input(scheme: Scheme, dtype: torch.dtype) -> Tensor | None:
    if scheme.fixed_input is None or scheme.input_activations is None:
        return None
    return fixed_input_scale(torch.tensor(3.5), scheme.input_activations, dtype)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("rows", [9, 13, 40])
@pytest.mark.parametrize("name", [*WEIGHTS, "NVFP4"])
def test_the_library_decompresses_what_the_engine_meant(name: str, rows: int, dtype: torch.dtype) -> None:
    scheme = WEIGHTS.get(name) or get_scheme(name)
    columns = 2 * scheme.weights.columns if scheme.weights.columns else 101
    weight = quantized(scheme, rows, columns, dtype)
    tensors = encode("model.layers.0.mlp.up_proj", weight, scheme, fixed_input(scheme, dtype))
    for loaded in DTYPE_NAMES:
        back = decode("model.layers.0.mlp.up_proj", tensors, scheme, loaded)
        assert back.dtype == loaded
        assert torch.equal(back, weight.dequantize(loaded))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("name", [*WEIGHTS, "NVFP4"])
def test_the_plan_knows_what_is_written(name: str, rows: int, dtype: torch.dtype) -> None:
    scheme = WEIGHTS.get(name) or get_scheme(name)
    columns = 3 * scheme.weights.columns if scheme.weights.columns else 100
    tensors = encode("a", quantized(scheme, rows, columns, dtype), scheme, fixed_input(scheme, dtype))
    planned = stored_tensors(scheme, (rows, columns), DTYPE_NAMES[dtype])
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == {
        f"a.{suffix}": (TORCH_DTYPES[spec.dtype], spec.shape) for suffix, spec in planned.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def unpacked(words: Tensor, columns: int) -> np.ndarray:
    """The int4 codes in int32 words, eight to a word, lowest bits first, stored with 8 added."""
    unsigned = words.numpy().view(np.uint32)
    nibbles = (unsigned[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    return nibbles.reshape(len(words), -1)[:, :columns].astype(np.int64) - 8


def test_packed_words_hold_the_codes_in_order() -> None:
    scheme = WEIGHTS["W4A16_ASYM-g32"]
    weight = quantized(scheme, 11, 96, torch.bfloat16)
    tensors = encode("a", weight, scheme)
    assert (unpacked(tensors["a.weight_packed"], 96) == weight.codes.numpy()).all()
    zero_points = weight.params.zero_point
    assert zero_points is not None
    assert (zero_points.numpy() == unpacked(tensors["a.weight_zero_point"].t().contiguous(), 11).T).all()
    assert tensors["a.weight_shape"].tolist() == [11, 96]
    assert torch.equal(tensors["a.weight_scale"], weight.params.scale)


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC"])
def test_bytes_hold_the_codes(name: str) -> None:
    scheme = WEIGHTS[name]
    weight = quantized(scheme, 11, 96, torch.bfloat16)
    tensors = encode("a", weight, scheme)
    assert tensors["a.weight"].dtype == weight.codes.dtype
    assert torch.equal(tensors["a.weight"].float(), weight.codes.float())


def test_the_library_cannot_unpack_zero_points_of_few_rows() -> None:
    """Plans refuse them, `too_few_outputs`, for as long as this is so."""
    scheme = WEIGHTS["W4A16_ASYM-g32"]
    for rows, columns in ((9, 96), (8, 32)):
        weight = quantized(scheme, rows, columns, torch.float32)
        back = decode("a", encode("a", weight, scheme), scheme, torch.float32)
        assert torch.equal(back, weight.dequantize(torch.float32))
    tensors = encode("a", quantized(scheme, 8, 96, torch.float32), scheme)
    with pytest.raises(RuntimeError, match="stride"):
        decode("a", tensors, scheme, torch.float32)


@pytest.mark.parametrize("name", ["W4A16-channel", "W8A8", "FP8_DYNAMIC"])
def test_no_scale_is_too_small_to_keep_the_codes(name: str) -> None:
    scheme = WEIGHTS[name]
    codes = all_codes(scheme.weights).to(code_dtype(scheme.weights)).unsqueeze(0)
    params = QuantizationParams(torch.tensor([[1e-44]]), None)  # subnormal: code * scale loses the code
    tensors = encode("a", QuantizedWeight(codes, params, scheme.weights), scheme)
    one = {**tensors, "a.weight_scale": torch.ones(1, 1)}
    assert torch.equal(decode("a", one, scheme, torch.float32), codes.float())


def recipe(**step: object) -> Recipe:
    return Recipe.model_validate({"steps": [{"ignore": ["lm_head", "re:.*down_proj"], **step}]})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_readers_parse_the_config(scheme: str, tmp_path: Path) -> None:
    made = plan(
        fake_llama(tmp_path / "model"),
        recipe(type="rtn", scheme=scheme, observer="minmax"),
        dataset=DatasetSpec(texts=("text",)),
    )
    written = quantization_config(made)
    parsed = QuantizationConfig.model_validate(written)
    group = parsed.config_groups["group_0"]
    planned = made.layers[0].modules[0].scheme
    assert planned is not None
    assert group.targets == ["Linear"]
    assert group.format == parsed.format == planned.format
    assert group.weights.num_bits == planned.weights.num_bits
    assert group.weights.group_size == planned.weights.group_size
    assert group.weights.symmetric == planned.weights.symmetric
    assert group.weights.strategy == planned.weights.strategy
    assert group.weights.scale_dtype == SCALE_DTYPES.get(planned.weights.scale_dtype)
    assert (group.input_activations is None) == (planned.input_activations is None)
    assert parsed.ignore == list(made.ignore)
    assert "model.layers.0.mlp.down_proj" in parsed.ignore
    assert parsed.quantization_status == "compressed"
    assert written["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("observer", "named"),
    [("minmax", "memoryless_minmax"), ("mse", "memoryless_mse"), ("imatrix", "imatrix_mse"), ("gram", None)],
)
def test_the_config_says_how_scales_were_found(observer: str, named: str | None, tmp_path: Path) -> None:
    made = plan(
        fake_llama(tmp_path / "model"),
        recipe(type="gptq", scheme="W4A16", observer=observer),
        dataset=DatasetSpec(texts=("text",)),
    )
    weights = quantization_config(made)["config_groups"]["group_0"]["weights"]
    assert weights["observer"] == named
    assert weights["actorder"] == "static"
