"""On-disk formats: packed and read by the compressed-tensors library, which is what readers run.

pack-quantized        weight_packed int32, weight_scale, weight_shape, weight_zero_point int32 (asymmetric)
int-quantized         weight int8, weight_scale
float-quantized       weight float8_e4m3fn, weight_scale; input_scale where activations are static
mxfp8-quantized       weight float8_e4m3fn, weight_scale uint8, a power of two (E8M0)
mxfp4-pack-quantized  weight_packed uint8 (two fp4 numbers), weight_scale uint8
nvfp4-pack-quantized  weight_packed uint8, weight_scale float8_e4m3fn, weight_global_scale; input_global_scale
                      where activations are quantized
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs as LibraryArgs
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from compression.math.grid import QuantizedWeight
from compression.schemes import KV_CACHE, QuantizationArgs, Scheme
from compression.steps import QuantizingStep

if TYPE_CHECKING:
    from compression.planning.plans import Plan


_ROWS = 1024
"""Rows that are packed at once: the library makes several int32 copies."""


def encode(
    name: str, weight: QuantizedWeight | Tensor, scheme: Scheme | None, fixed_input: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that hold `weight` on disk, under their full names "<name>.weight_packed", ...

    A weight without a scheme is a tensor, stored as it is. fixed_input: the tensor that the scheme's
    `fixed_input` names.
    """
    if scheme is None or isinstance(weight, Tensor):
        assert isinstance(weight, Tensor)
        return {f"{name}.weight": weight.contiguous()}
    packed = {**_packed(weight, scheme.format), "weight_scale": weight.params.scale}
    if weight.params.global_scale is not None:
        packed["weight_global_scale"] = weight.params.global_scale
    if scheme.fixed_input is not None:
        assert fixed_input is not None
        packed[scheme.fixed_input] = fixed_input
    return {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}


def _packed(weight: QuantizedWeight, format: str) -> dict[str, Tensor]:
    """The codes as the format lays them out, by suffix."""
    args, zero_point = weight.args, weight.params.zero_point
    parts = torch.split(weight.codes, _ROWS)
    if args.is_fp4:
        return {"weight_packed": torch.cat([pack_fp4_to_uint8(part.float()) for part in parts])}
    if format != "pack-quantized":
        return {"weight": weight.codes}
    packed = {
        "weight_packed": torch.cat([pack_to_int32(part, args.num_bits) for part in parts]),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if zero_point is not None:
        packed["weight_zero_point"] = pack_to_int32(zero_point, args.num_bits, packed_dim=0)
    return packed


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme | None, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a reader gets which loads the checkpoint in `dtype`, by the library."""
    if scheme is None:
        return tensors[f"{name}.weight"].to(dtype)
    prefix = f"{name}."
    state = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and key.removeprefix(prefix) != "bias"
    }
    if scheme.weights.scale_dtype is None:
        state["weight_scale"] = state["weight_scale"].to(dtype)
    library_scheme = _library_scheme(scheme.weights, scheme.input_activations, scheme.format)
    weight: Tensor = _compressor(scheme.format).decompress(state, library_scheme)["weight"]
    return weight.to(dtype)


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """config.json["quantization_config"], key by key what LLM Compressor 0.14 writes for the same choice.

    One config group per distinct scheme, in the order of the layers. A single one targets the class Linear,
    and `ignore` names the linears left alone; with several, each group names its modules. None where nothing
    is quantized.
    """
    modules: dict[tuple[Scheme, int], list[str]] = {}
    for layer in plan.layers:
        for module in layer.modules:
            if module.scheme is not None and module.step is not None:
                modules.setdefault((module.scheme, module.step), []).append(module.name)
    if not modules:
        return None
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(modules) == 1 else names,
            "weights": _weights_dict(scheme.weights, plan.recipe.quantizing[step]),
            "input_activations": _activations_dict(scheme.input_activations),
            "output_activations": None,
            "format": scheme.format,
        }
        for index, ((scheme, step), names) in enumerate(modules.items())
    }
    formats = {scheme.format for scheme, _ in modules}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(plan.ignore),
        "kv_cache_scheme": None if plan.recipe.kv_cache_step is None else _args_dict(KV_CACHE),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": compressed_tensors.__version__,
    }


_OBSERVER_NAMES = {"minmax": "memoryless_minmax", "mse": "memoryless_mse", "imatrix": "imatrix_mse"}
"""Our observers under the library's names. It has none for gram; readers do not use the field."""

_SCALE_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "E8M0": torch.uint8}


def _weights_dict(args: QuantizationArgs, step: QuantizingStep) -> dict[str, Any]:
    observer = _OBSERVER_NAMES.get(step.observer or "")
    return _args_dict(args, observer, step.options.get("actorder"))


def _activations_dict(args: QuantizationArgs | None) -> dict[str, Any] | None:
    if args is None:
        return None
    return _args_dict(args, None if args.dynamic is True else "static_minmax")


def _args_dict(
    args: QuantizationArgs, observer: str | None = None, actorder: str | None = None
) -> dict[str, Any]:
    """One kind of tensor in the config."""
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "symmetric": args.symmetric,
        "strategy": args.strategy,
        "group_size": args.group_size,
        "block_structure": list(args.block_structure) if args.block_structure else None,
        "dynamic": args.dynamic,
        "actorder": actorder,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": str(_SCALE_DTYPES[args.scale_dtype]) if args.scale_dtype else None,
        "zp_dtype": None if args.symmetric else "torch.int8",
    }


def _library_scheme(
    weights: QuantizationArgs, activations: QuantizationArgs | None, format: str
) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=_library_args(weights),
        input_activations=None if activations is None else _library_args(activations),
        format=format,
    )


def _library_args(args: QuantizationArgs) -> LibraryArgs:
    return LibraryArgs(
        num_bits=args.num_bits,
        type=args.type,
        symmetric=args.symmetric,
        strategy=args.strategy,
        group_size=args.group_size,
        block_structure=list(args.block_structure) if args.block_structure else None,
        dynamic=args.dynamic,
        scale_dtype=_SCALE_DTYPES[args.scale_dtype] if args.scale_dtype else None,
    )


def _compressor(format: str) -> type[BaseCompressor]:
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(format)
    return compressor
