"""Checkpoints in block FP8, as DeepSeek stores them: the weights that they stand for.

config.json says {"quant_method": "fp8", "weight_block_size": [128, 128]}. A linear is two tensors: `weight`
in fp8 (e4m3), and `weight_scale_inv`, by which each block is multiplied. What they stand for is their product
in the dtype of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.stated import stated_dtype
from compression.checkpoint.tensors import BlockScaledWeight, StoredTensor, TensorInfo
from compression.errors import SourceError

SCALE_SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it would be without block FP8; any other stays as it is.

    Raises:
        SourceError: `config_invalid`, `checkpoint_incomplete`, `shape_mismatch` or `unsupported_dtype`, where
            config.json and tensors do not fit together.
    """
    block = _block(checkpoint.config.get("quantization_config"))
    if block is None:
        return checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    dtype = _dtype(config)
    tensors: dict[str, StoredTensor] = dict(checkpoint.tensors)
    for name, codes in checkpoint.tensors.items():
        if codes.dtype == "F8_E4M3" and name.endswith(".weight"):
            tensors[name] = _weight(codes, tensors.pop(name + SCALE_SUFFIX, None), block, dtype)
    return replace(checkpoint, config=config, tensors=tensors)


def _block(quantization: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; None for what is not block FP8 with activations quantized at run time."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    if quantization.get("activation_scheme", "dynamic") != "dynamic" or not isinstance(block, list):
        return None
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return None
    return block[0], block[1]


def _dtype(config: Mapping[str, Any]) -> str:
    stated = stated_dtype(config)
    dtype = _DTYPES.get(stated) if stated is not None else None
    if dtype is None:
        raise SourceError(
            "config_invalid",
            f"config.json: the weights are in block FP8, and dtype is {str(stated)[:40]}.",
            f"Say in dtype what they stand for: {', '.join(_DTYPES)}.",
        )
    return dtype


def _weight(
    codes: StoredTensor, scales: StoredTensor | None, block: tuple[int, int], dtype: str
) -> BlockScaledWeight:
    name = codes.name
    if scales is None:
        raise SourceError(
            "checkpoint_incomplete",
            f"{name} is in fp8, and {name}{SCALE_SUFFIX} is missing.",
            "Download the model again.",
        )
    blocks = tuple(-(-size // step) for size, step in zip(codes.shape, block, strict=False))
    if len(codes.shape) != 2 or scales.shape != blocks:
        raise SourceError(
            "shape_mismatch",
            f"{name} is {list(codes.shape)} in blocks of {list(block)}, its scales are {list(scales.shape)}.",
            "Correct weight_block_size in config.json, or take the files that belong to it.",
        )
    if scales.dtype not in SCALE_DTYPES:
        raise SourceError(
            "unsupported_dtype",
            f"{scales.name} is {scales.dtype}.",
            f"Convert it to one of {', '.join(SCALE_DTYPES)}.",
        )
    assert isinstance(codes, TensorInfo)  # nothing has been made of others yet
    assert isinstance(scales, TensorInfo)
    return BlockScaledWeight(name, codes, scales, block, dtype)
