"""What the tests of the numerics share: schemes at several group sizes, and plain float64 formulas."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs as LibraryArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from compression.math.grid import QuantizationParams
from compression.schemes import QuantizationArgs, Scheme, get_scheme

WEIGHTS: dict[str, Scheme] = {
    "W4A16-g32": get_scheme("W4A16").with_group_size(32),
    "W4A16-g64": get_scheme("W4A16").with_group_size(64),
    "W4A16-g128": get_scheme("W4A16"),
    "W4A16-channel": get_scheme("W4A16").with_group_size(None),
    "W4A16_ASYM-g32": get_scheme("W4A16_ASYM").with_group_size(32),
    "W4A16_ASYM-g128": get_scheme("W4A16_ASYM"),
    "W4A16_ASYM-channel": get_scheme("W4A16_ASYM").with_group_size(None),
    "W3A16-g32": get_scheme("W3A16").with_group_size(32),
    "W8A16-g128": get_scheme("W8A16"),
    "W8A8": get_scheme("W8A8"),
    "FP8_DYNAMIC": get_scheme("FP8_DYNAMIC"),
    "FP8": get_scheme("FP8"),
    "FP8_BLOCK-128": get_scheme("FP8_BLOCK"),
    "MXFP8A16": get_scheme("MXFP8A16"),
    "MXFP4A16": get_scheme("MXFP4A16"),
    "NVFP4A16": get_scheme("NVFP4A16"),
}

BY_ROW = [name for name, scheme in WEIGHTS.items() if scheme.weights.strategy in ("channel", "group")]
"""Those in which no scale belongs to two rows."""

FLOAT4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "E8M0": torch.uint8}


def library_args(args: QuantizationArgs) -> LibraryArgs:
    """The same grid for the compressed-tensors library."""
    return LibraryArgs(
        num_bits=args.num_bits,
        type=args.type,
        symmetric=args.symmetric,
        strategy=args.strategy,
        group_size=args.group_size,
        block_structure=list(args.block_structure) if args.block_structure else None,
        dynamic=args.dynamic,
        scale_dtype=SCALE_DTYPES.get(args.scale_dtype),
    )


def library_params(
    weight: Tensor, args: QuantizationArgs, shrink: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the library makes of a weight's ranges, all shrunk: scale (a float), zero point, global scale."""
    rows, columns = weight.shape
    height = {"tensor": rows, "block": 128}.get(args.strategy, 1)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % height))
    blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, args.columns or columns)).transpose(1, 2)
    low, high = blocks.flatten(2).amin(-1), blocks.flatten(2).amax(-1)
    global_scale = None
    if args.strategy == "tensor_group":
        global_scale = generate_gparam(low.amin().reshape(1), high.amax().reshape(1))
    scale, zero_point = calculate_qparams(low * shrink, high * shrink, library_args(args), global_scale)
    if args.strategy == "tensor":
        scale, zero_point = scale.flatten(), zero_point.flatten()
    return scale, zero_point, global_scale


def all_codes(args: QuantizationArgs) -> Tensor:
    """Every code of the grid as float64, ascending."""
    if args.type == "int":
        low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1)
        return torch.arange(low, high, dtype=torch.float64)
    if args.num_bits == 4:
        positive = torch.tensor(FLOAT4_NUMBERS, dtype=torch.float64)
        return torch.cat([-positive, positive]).unique()
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    return bits[bits.isfinite()].unique()


def spread(
    params: QuantizationParams, args: QuantizationArgs, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Step and zero point of every weight of a matrix [out, in], float64."""
    rows, columns = shape
    scale = params.scale.double()
    if args.scale_dtype == "E8M0":
        scale = 2.0 ** (scale - 127)
    if params.global_scale is not None:
        scale = scale / params.global_scale.double()
    scale = scale.view(-1, columns // (args.columns or columns))

    def to_weights(values: Tensor) -> Tensor:
        tall = values.repeat_interleave(
            rows if args.strategy == "tensor" else 128 if args.block_structure else 1, 0
        )
        return tall[:rows].repeat_interleave(columns // values.shape[1], 1)

    zero_point = torch.zeros_like(scale) if params.zero_point is None else params.zero_point.double()
    return to_weights(scale), to_weights(zero_point)


def restored(codes: Tensor, params: QuantizationParams, args: QuantizationArgs) -> Tensor:
    """(code - zero_point) * step in float64, [out, in]."""
    step, zero_point = spread(params, args, (codes.shape[0], codes.shape[1]))
    return (codes.double() - zero_point) * step


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations [tokens, features] float32 with a few loud channels, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, features // 2, generator=generator) @ torch.randn(
        features // 2, features, generator=generator
    )
    noise = torch.randn(tokens, features, generator=generator)
    return (mixed / features**0.5 + noise) * torch.randn(features, generator=generator).exp()
