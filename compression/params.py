"""Scales and zero points: what they are on disk, what they mean, and how a range of numbers becomes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compression.schemes import QuantizationArgs

_FLOAT8_MAX, _FLOAT8_EPS = 448.0, 0.125
"""Of float8_e4m3fn; a scale that would be 0 is stored as the latter, as compressed-tensors does."""


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

    def as_stored(self, args: QuantizationArgs) -> QuantizationParams:
        """With scales in the dtype to whose numbers they were rounded."""
        if args.scale_dtype != "F8_E4M3":
            return self
        return self._replace(scale=self.scale.to(torch.float8_e4m3fn))

    def by_row(self, args: QuantizationArgs, rows: int) -> QuantizationParams:
        """Steps (as scale) and zero points of each of so many rows: [rows, groups]."""
        steps = self.steps(args)
        if args.strategy == "tensor":
            steps = steps.expand(rows, 1)
        elif args.block_structure:
            steps = steps.repeat_interleave(args.block_structure[0], dim=0)[:rows]
        return QuantizationParams(steps, self.zero_point)

    def where(self, condition: Tensor, other: QuantizationParams) -> QuantizationParams:
        """`other` where `condition` holds, else these."""
        zero_point = self.zero_point
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(condition, other.zero_point, zero_point)
        return self._replace(scale=torch.where(condition, other.scale, self.scale), zero_point=zero_point)

    def gather(self, index: Tensor) -> QuantizationParams:
        """From parameters [tries, rows], those of try index [1, rows]: [rows]."""
        zero_point = None if self.zero_point is None else self.zero_point.gather(0, index)[0]
        return self._replace(scale=self.scale.gather(0, index)[0], zero_point=zero_point)

    def rows(self, start: int, stop: int) -> QuantizationParams:
        """The parameters of output rows start to stop, where each has its own."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return self._replace(scale=self.scale[start:stop], zero_point=zero_point)


def group_columns(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """View [out, in] as [out, groups, columns that share a scale]."""
    return weight.view(weight.shape[0], -1, args.columns or weight.shape[1])


def spanning_params(weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> QuantizationParams:
    """Scales that span the smallest to the largest of the weights that share one, zero included."""
    rows, columns = weight.shape
    low, high = group_columns(weight, args).aminmax(dim=-1)
    global_scale = None
    if args.strategy == "tensor_group":
        global_scale = global_scale_of(torch.maximum(-low.amin(), high.amax()).reshape(1), scale_dtype)
    if (sharing := rows_sharing(args, rows)) > 1:
        shape = args.scale_shape((rows, columns))
        low = over_rows(low.t(), sharing, torch.amin).t().reshape(shape)
        high = over_rows(high.t(), sharing, torch.amax).t().reshape(shape)
    elif args.strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    return params_of_range(low, high, args, scale_dtype, global_scale)


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

    In scale_dtype; uint8 exponents for E8M0; float32 numbers that float8 has, where there is a global scale.
    """
    low = low.clamp(max=0).to(scale_dtype)
    high = high.clamp(min=0).to(scale_dtype)
    if args.scale_dtype == "E8M0":
        return QuantizationParams(_exponents(torch.maximum(-low, high), args), None)
    smallest, largest = args.range
    # a tensor on the device: CUDA would multiply by the reciprocal of a Python number
    steps = torch.tensor(largest - smallest, dtype=scale_dtype, device=low.device)
    if args.symmetric:
        scale = torch.maximum(-low, high) / (steps / 2)
        zero_point = None
    else:
        scale = (high - low) / steps
        exact = (smallest - low / scale).clamp(smallest, largest)
        zero_point = exact.nan_to_num(nan=0.0).round().to(torch.int8)  # NaN is 0/0: a group of zeros
    if global_scale is not None:
        scale = (global_scale * scale).clamp(max=_FLOAT8_MAX).to(torch.float8_e4m3fn).float()
        return QuantizationParams(scale.masked_fill_(scale == 0, _FLOAT8_EPS), None, global_scale)
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
