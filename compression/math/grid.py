"""Number grids: what scales, zero points and codes are, and how numbers are rounded to codes and come back.

    weight [out, in]  --compression.math.search-->     QuantizationParams (scale, zero_point, global_scale)
                      --quantize, or a method-->       codes int8 | float8_e4m3fn [out, in]
                      --QuantizedWeight.dequantize-->  what a reader of the checkpoint computes

A code q stands for (q - zero_point) * step, the step being what the stored scale means. Arithmetic is in
float32 (rounding in bfloat16 moves 8% of int8 codes), with scales that are already rounded to the dtype in
which they are stored. fp4 (e2m1) codes are held in float8_e4m3fn, which has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compression.schemes import QuantizationArgs

_FLOAT8_MAX, _FLOAT8_EPS = 448.0, 0.125
"""Of float8_e4m3fn; a scale that would be 0 is stored as the latter, as compressed-tensors does."""

_FLOATS = {4: (1, 1.0), 8: (3, 2.0**-6)}
"""Of e2m1 and e4m3: how many bits of fraction, and the smallest number that has all of them."""
_SIGNLESS_EXPONENT = 0x7F800000
"""The bits of a float32's exponent."""


class QuantizationParams(NamedTuple):
    """Scales as they are stored, of the shape that `QuantizationArgs.scale_shape` says.

    scale: in the dtype of the weights, or float8_e4m3fn, or uint8, which is a power of two (E8M0).
    zero_point: int8 like scale, None when symmetric. global_scale: [1] float32, what group scales were
    multiplied with before they were rounded; None with one level of scales.
    """

    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None = None

    def steps(self, args: QuantizationArgs) -> Tensor:
        """What a code of 1 stands for, float32, of the shape of scale."""
        if args.scale_dtype == "E8M0":
            exponent = self.scale.int()
            # as float32 has them, but for 2^-127, which it has without an exponent
            return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)
        scale = self.scale.float()
        return scale if self.global_scale is None else scale / self.global_scale

    def moved(self, places: Tensor, args: QuantizationArgs) -> QuantizationParams:
        """Scales at `places` [tries, scales] from these: 0.1 is a tenth more; where scales have a dtype of
        their own, 1 is the next number that it has. Float8 numbers come in float32, which can be chosen from.
        """
        if args.scale_dtype is None:
            return self._replace(scale=(self.scale.float() * (1 + places)).to(self.scale.dtype))
        if args.scale_dtype == "E8M0":
            return self._replace(scale=(self.scale + places.int()).clamp_(0, 254).to(torch.uint8))
        # positive float8 numbers are in the order of their bits; 0x7e is the largest
        bits = self.scale.view(torch.uint8).int() + places.int()
        return self._replace(scale=bits.clamp_(1, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn).float())

    def by_row(self, args: QuantizationArgs, rows: int) -> QuantizationParams:
        """Steps (as scale) and zero points of each of so many rows: [rows, groups]."""
        steps = self.steps(args)
        if args.strategy == "tensor":
            steps = steps.expand(rows, 1)
        elif args.block_structure:
            steps = steps.repeat_interleave(args.block_structure[0], dim=0)[:rows]
        return QuantizationParams(steps, self.zero_point)

    def rows(self, start: int, stop: int) -> QuantizationParams:
        """The parameters of output rows start to stop, where each has its own."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return self._replace(scale=self.scale[start:stop], zero_point=zero_point)


@dataclass(frozen=True)
class QuantizedWeight:
    """codes [out, in], int8 or float8_e4m3fn, with the parameters that give them meaning."""

    codes: Tensor
    params: QuantizationParams
    args: QuantizationArgs

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as compressed-tensors computes it when the checkpoint is loaded in `dtype`.

        That is (code - zero_point) * scale with every operand in `dtype`, rounded once by the product. Where
        scales have a dtype of their own, the library multiplies in bfloat16 or float32 and gives bfloat16.
        """
        if self.args.scale_dtype is not None:
            return self._times_scale(torch.float32).to(torch.bfloat16).to(dtype)
        return self._times_scale(dtype)

    def _times_scale(self, dtype: torch.dtype) -> Tensor:
        values = group_columns(self.codes.to(dtype), self.args)
        params = self.params.by_row(self.args, len(self.codes))
        if params.zero_point is not None:
            values -= params.zero_point.to(dtype).unsqueeze(-1)
        values *= params.scale.to(dtype).unsqueeze(-1)
        return values.flatten(1)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output rows start to stop: one linear out of a stack, where what has one scale has it together."""
        shared = self.args.strategy in ("tensor", "block")
        params = self.params if shared else self.params.rows(start, stop)
        return QuantizedWeight(self.codes[start:stop], params, self.args)


class Rounded(NamedTuple):
    """What a method that quantizes gives back.

    weight: [out, in]. dampening_frac: the fraction that made the Gram matrix positive definite,
    None where nothing was factorized. dead_columns: how many input columns were never non-zero.
    """

    weight: QuantizedWeight
    dampening_frac: float | None = None
    dead_columns: int = 0


def group_columns(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """View [out, in] as [out, groups, columns that share a scale]."""
    return weight.view(weight.shape[0], -1, args.columns or weight.shape[1])


def rows_sharing(args: QuantizationArgs, rows: int) -> int:
    """How many rows of a weight have a scale in common."""
    if args.strategy == "tensor":
        return rows
    return args.block_structure[0] if args.block_structure else 1


def over_rows(values: Tensor, sharing: int, reduce: Callable[..., Tensor]) -> Tensor:
    """[..., rows] reduced over each run of rows that share a scale; zeros stand in for what is missing."""
    if sharing == 1:
        return values
    missing = -values.shape[-1] % sharing
    whole = torch.nn.functional.pad(values, (0, missing))
    return reduce(whole.reshape(*values.shape[:-1], -1, sharing), dim=-1)


def to_rows(values: Tensor, sharing: int, rows: int) -> Tensor:
    """[..., scales] -> [..., rows]: each row's own."""
    return values if sharing == 1 else values.repeat_interleave(sharing, dim=-1)[..., :rows]


def global_scale_of(largest: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """[1] float32: what makes the largest group's scale the largest float8 number, as `generate_gparam`.

    largest: [1], the largest magnitude of all that the global scale is for.
    """
    # float16 has no room for 448 * 6 / 0.04
    work = torch.float32 if scale_dtype == torch.float16 else scale_dtype
    largest = largest.to(work).clamp(min=torch.finfo(work).tiny)
    return (_FLOAT8_MAX * 6.0 / largest).float().nan_to_num(nan=1.0, posinf=1.0)


def params_of_range(
    low: Tensor,
    high: Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> QuantizationParams:
    """Scale and zero point that map [low, high], widened to hold 0, onto the codes.

    In scale_dtype; uint8 exponents for E8M0; float8 where there is a global scale.
    """
    low = low.clamp(max=0).to(scale_dtype)
    high = high.clamp(min=0).to(scale_dtype)
    if args.scale_dtype == "E8M0":
        return QuantizationParams(_exponents(torch.maximum(-low, high), args), None)
    smallest, largest = args.range
    # a tensor, as CUDA would multiply by the reciprocal of a Python number; filled there, not copied there
    steps = low.new_full((), largest - smallest)
    if args.symmetric:
        scale = torch.maximum(-low, high) / (steps / 2)
        zero_point = None
    else:
        scale = (high - low) / steps
        exact = (smallest - low / scale).clamp(smallest, largest)
        zero_point = exact.nan_to_num(nan=0.0).round().to(torch.int8)  # NaN is 0/0: a group of zeros
    if global_scale is not None:
        scale = (global_scale * scale).clamp(max=_FLOAT8_MAX).to(torch.float8_e4m3fn).float()
        scale = scale.masked_fill_(scale == 0, _FLOAT8_EPS).to(torch.float8_e4m3fn)
        return QuantizationParams(scale, None, global_scale)
    eps = torch.finfo(scale_dtype).eps
    return QuantizationParams(scale.masked_fill_(scale == 0, eps), zero_point)


def _exponents(largest: Tensor, args: QuantizationArgs) -> Tensor:
    """E8M0 exponents, uint8 with bias 127, for groups of these largest magnitudes.

    2^floor(log2 largest) becomes the largest power of two among the codes (4 of 6, 256 of 448); from 1.75
    times that on the next one is taken, as compressed-tensors does (`generate_mx_scales`).
    """
    fraction, exponent = torch.frexp(largest.float())  # fraction in [0.5, 1)
    exponent += 126 + (fraction >= 0.875).int() - math.floor(math.log2(args.range[1]))
    return exponent.masked_fill_(largest == 0, 0).clamp_(0, 254).to(torch.uint8)


def quantize(weight: Tensor, params: QuantizationParams, args: QuantizationArgs) -> Tensor:
    """Codes [out, in] nearest to the weight [out, in], int8 or float8_e4m3fn; ties to even, clamped."""
    by_row = params.by_row(args, len(weight))
    scaled = group_columns(weight.float(), args) / by_row.scale.unsqueeze(-1)
    if by_row.zero_point is not None:
        scaled += by_row.zero_point.float().unsqueeze(-1)
    codes = round_to_grid(scaled, args, out=scaled).flatten(1)
    if args.type == "float":
        codes.copysign_(weight)  # as compressed-tensors, which keeps the sign of what becomes 0
    return codes.to(code_dtype(args))


def rtn(weight: Tensor, args: QuantizationArgs, params: QuantizationParams) -> QuantizedWeight:
    """Round to nearest: every weight [out, in] takes the code nearest to it, computed in float32."""
    return QuantizedWeight(quantize(weight, params, args), params, args)


def round_to_nearest(
    weight: Tensor, _gram: Tensor | None, args: QuantizationArgs, params: QuantizationParams, **_keep: object
) -> Rounded:
    """`rtn` as a method of the registry. What was pruned is 0, and stays so: every grid has a code for 0."""
    return Rounded(rtn(weight, args, params))


def code_dtype(args: QuantizationArgs) -> torch.dtype:
    """The dtype that holds codes in memory."""
    return torch.float8_e4m3fn if args.type == "float" else torch.int8


def round_to_grid(values: Tensor, args: QuantizationArgs, out: Tensor, spare: Tensor | None = None) -> Tensor:
    """The code nearest to each scaled value, ties to even, in the values' dtype. Zeros may lose their sign.

    out: may be `values` itself. spare: like out, for what is computed on the way; made where it is not given.
    """
    torch.clamp(values, *args.range, out=out)
    if args.type == "int":
        return out.round_()
    if args.num_bits == 8 and not out.is_cpu:
        return out.copy_(out.to(torch.float8_e4m3fn))  # fewer kernels there; on a CPU the slower way
    if out.dtype != torch.float32:
        wide = out.float()
        return out.copy_(round_to_grid(wide, args, out=wide))
    fraction_bits, smallest_normal = _FLOATS[args.num_bits]
    power = torch.empty_like(out) if spare is None else spare
    # a number's bits without its fraction: the power of two below it, which says how far codes are apart
    torch.bitwise_and(out.view(torch.int32), _SIGNLESS_EXPONENT, out=power.view(torch.int32))
    # added to it, this pushes out of float32 what is finer than a code
    pushing = power.clamp_(min=smallest_normal).mul_(1.5 * 2.0 ** (23 - fraction_bits))
    return out.add_(pushing).sub_(pushing)


def extremes(values: Tensor, dim: int, *, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The least and the largest along a dimension; on a CPU several times faster than `Tensor.aminmax`."""
    return values.amin(dim, keepdim), values.amax(dim, keepdim)


def fake_quantize(x: Tensor, args: QuantizationArgs, fixed: Tensor | None = None) -> Tensor:
    """Activations [..., features] rounded as compressed-tensors' quantized forward rounds them.

    Symmetric min-max scale per token, or group of a token's features, every step in x's dtype (with a global
    scale in float32), as a reader of the checkpoint does. fixed: [1], what is not found at run time, which is
    the scale of strategy `tensor`, the global scale of `tensor_group`.
    """
    values = x if args.columns is None else x.reshape(*x.shape[:-1], -1, args.columns)
    if args.dynamic is False:
        assert fixed is not None
        step = fixed.to(x.dtype)
    else:
        low, high = extremes(values, -1, keepdim=True)
        params = params_of_range(low, high, args, x.dtype, fixed)
        step = params.scale if args.scale_dtype is None else params.steps(args)
        if args.scale_dtype == "E8M0":
            step = step.to(x.dtype)
            step.masked_fill_(step == 0, 1.0)  # float16 has no such small number
    scaled = values / step
    rounded = round_to_grid(scaled, args, out=scaled).mul_(step).to(x.dtype)
    return rounded if args.columns is None else rounded.flatten(-2)


def fixed_input_scale(largest: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> Tensor:
    """What calibration fixes of activations of which `largest` is the largest magnitude: [1], as stored.

    The scale in `scale_dtype` with strategy `tensor`, the global scale in float32 with `tensor_group`.
    """
    largest = largest.reshape(1)
    if args.strategy == "tensor_group":
        return global_scale_of(largest, scale_dtype)
    return params_of_range(-largest, largest, args, scale_dtype).scale
