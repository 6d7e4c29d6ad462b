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

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs as LibraryArgs
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.impl_backend import ImplBackend
from torch import Tensor

from compression.math.grid import QuantizedWeight
from compression.schemes import QuantizationArgs, Scheme

SCALE_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "E8M0": torch.uint8}
"""The dtypes of scales on disk, by the names that schemes have for them."""

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
        # the library's own code in torch: on a GPU it would take a kernel that needs a C compiler at run time
        packed_parts = [ImplBackend.call("pack_fp4_to_uint8", part.float()) for part in parts]
        return {"weight_packed": torch.cat(packed_parts)}
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
        scale_dtype=SCALE_DTYPES[args.scale_dtype] if args.scale_dtype else None,
    )


def _compressor(format: str) -> type[BaseCompressor]:
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(format)
    return compressor
