"""What the tests of the numerics share: schemes at several group sizes, and plain float64 formulas."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs as LibraryArgs
from torch import Tensor

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
}


def library_args(args: QuantizationArgs) -> LibraryArgs:
    """The same grid for the compressed-tensors library."""
    return LibraryArgs(
        num_bits=args.num_bits,
        type=args.type,
        symmetric=args.symmetric,
        strategy=args.strategy,
        group_size=args.group_size,
        dynamic=args.dynamic,
    )


def all_codes(args: QuantizationArgs) -> Tensor:
    """Every code of the grid as float64, ascending."""
    if args.type == "int":
        low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1)
        return torch.arange(low, high, dtype=torch.float64)
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    return bits[bits.isfinite()].unique()


def restored(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(code - zero_point) * scale in float64, [out, in]."""
    size = codes.shape[1] // scale.shape[1]
    shift = 0.0 if zero_point is None else zero_point.double().repeat_interleave(size, 1)
    return (codes.double() - shift) * scale.double().repeat_interleave(size, 1)


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations [tokens, features] float32 with a few loud channels, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, features // 2, generator=generator) @ torch.randn(
        features // 2, features, generator=generator
    )
    noise = torch.randn(tokens, features, generator=generator)
    return (mixed / features**0.5 + noise) * torch.randn(features, generator=generator).exp()
