"""Grids, scales and codes: how a float tensor becomes integers (or fp8) and comes back.

    weight [out, in]  --minmax_params / search_params-->  QuantizationParams (scale, zero_point)
                      --quantize-->                       codes int8 | float8_e4m3fn [out, in]
                      --QuantizedWeight.dequantize-->     what a reader of the checkpoint computes

A code q stands for (q - zero_point) * scale. Arithmetic is in float32 (rounding in bfloat16 moves 8% of int8
codes), with scales that are already rounded to the dtype in which they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.schemes import QuantizationArgs

_COARSE_SHRINKS = tuple(1.10 - 0.05 * step for step in range(15))  # 1.10 ... 0.40
_FINE_OFFSETS = (-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375)
_CHUNK_ELEMENTS = 1 << 15
"""Weights searched at once: with its temporaries a chunk stays in a core's level-2 cache."""


class QuantizationParams(NamedTuple):
    """scale [out, groups] in the stored dtype; zero_point [out, groups] int8, None when symmetric.

    groups is in / group_size, and 1 for one scale per channel.
    """

    scale: Tensor
    zero_point: Tensor | None

    def where_better(self, better: Tensor, other: QuantizationParams) -> QuantizationParams:
        """`other` where `better` [out, groups] holds, else this."""
        zero_point = self.zero_point
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(better, other.zero_point, zero_point)
        return QuantizationParams(torch.where(better, other.scale, self.scale), zero_point)

    def rows(self, start: int, stop: int) -> QuantizationParams:
        """The parameters of output rows start to stop."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return QuantizationParams(self.scale[start:stop], zero_point)


@dataclass(frozen=True)
class QuantizedWeight:
    """codes [out, in], int8 or float8_e4m3fn, with the parameters that give them meaning."""

    codes: Tensor
    params: QuantizationParams
    args: QuantizationArgs

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as compressed-tensors computes it when the checkpoint is loaded in `dtype`.

        That is (code - zero_point) * scale with every operand in `dtype`, rounded once by the product.
        """
        values = group_columns(self.codes.to(dtype), self.args)
        if self.params.zero_point is not None:
            values -= self.params.zero_point.to(dtype).unsqueeze(-1)
        values *= self.params.scale.to(dtype).unsqueeze(-1)
        return values.flatten(1)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output rows start to stop: one linear out of a stacked solve."""
        return QuantizedWeight(self.codes[start:stop], self.params.rows(start, stop), self.args)


def group_columns(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """View [out, in] as [out, groups, group_size]."""
    return weight.view(weight.shape[0], -1, args.group_size or weight.shape[1])


def require_finite_weight(name: str, weight: Tensor) -> None:
    """Refuse NaN and Inf in the weight of module `name`.

    Raises:
        NumericalError: `non_finite_weights`.
    """
    if not torch.isfinite(weight.sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
        raise NumericalError(
            "non_finite_weights",
            f"The weight of {name} holds NaN or Inf.",
            "The source checkpoint is damaged: download it again.",
        )


def minmax_params(weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> QuantizationParams:
    """Scales that span the smallest to the largest weight of each group, zero included.

    Computed in `scale_dtype`, step by step, as compressed-tensors does (`calculate_qparams`): the same bits.
    """
    low, high = group_columns(weight, args).aminmax(dim=-1)
    return _params_of_range(low, high, args, scale_dtype)


def search_params(
    weight: Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    gram: Tensor | None = None,
) -> QuantizationParams:
    """Scales whose rounding error is least, over shrinks of the min-max range; never worse than min-max.

    The error e = w - w' of one row's group is measured as
        sum e^2                            without statistics (observer mse),
        sum importance * e^2               importance [in] = E[x^2] (observer imatrix),
        e G e^T                            gram [in, in] = X^T X, G its block for the group (observer gram):
                                           Hessian-weighted MSE, the output error this group alone causes.
    A coarse grid of shrinks is tried on every group, then a fine one around each group's best.
    """
    if importance is not None and gram is not None:
        raise ValueError("give importance or gram, not both")
    error = _error_measure(weight, args, importance, gram)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    found = [_search_rows(chunk.float(), args, scale_dtype, error) for chunk in torch.split(weight, rows)]
    zero_points = [zero for _, zero in found if zero is not None]
    return QuantizationParams(
        torch.cat([scale for scale, _ in found]), torch.cat(zero_points) if zero_points else None
    )


def quantize(weight: Tensor, params: QuantizationParams, args: QuantizationArgs) -> Tensor:
    """Codes [out, in] nearest to the weight [out, in], int8 or float8_e4m3fn; ties to even, clamped."""
    codes = _nearest_codes(group_columns(weight.float(), args), params, args)
    return codes.flatten(1).to(code_dtype(args))


def code_dtype(args: QuantizationArgs) -> torch.dtype:
    """The dtype that holds codes in memory."""
    return torch.float8_e4m3fn if args.type == "float" else torch.int8


def fake_quantize(x: Tensor, args: QuantizationArgs) -> Tensor:
    """Activations [..., features] rounded per token as compressed-tensors' quantized forward rounds them.

    Symmetric min-max scale per token, every step in x's dtype, as a reader of the checkpoint does.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale, _ = _params_of_range(low, high, args, x.dtype)
    return round_to_grid_(x / scale, args).mul_(scale)


def round_to_grid_(values: Tensor, args: QuantizationArgs) -> Tensor:
    """Clamp and round scaled values in place to the nearest code, kept in their float dtype."""
    values.clamp_(*args.range)
    if args.type == "float":
        return values.copy_(values.to(torch.float8_e4m3fn))
    return values.round_()


def _nearest_codes(grouped: Tensor, params: QuantizationParams, args: QuantizationArgs) -> Tensor:
    """Codes as float32, [out, groups, group_size] like the float32 input."""
    codes = grouped / params.scale.float().unsqueeze(-1)
    if params.zero_point is not None:
        codes += params.zero_point.float().unsqueeze(-1)
    return round_to_grid_(codes, args)


def _params_of_range(
    low: Tensor, high: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype
) -> QuantizationParams:
    """Scale and zero point that map [low, high], widened to hold 0, onto the codes; in scale_dtype."""
    low = low.clamp(max=0).to(scale_dtype)
    high = high.clamp(min=0).to(scale_dtype)
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
    scale[scale == 0] = torch.finfo(scale_dtype).eps
    return QuantizationParams(scale, zero_point)


_ErrorMeasure = Callable[[Tensor], Tensor]
"""Rounding errors [rows, groups, group_size], which it may overwrite -> what they cost, [rows, groups]."""


def _error_measure(
    weight: Tensor, args: QuantizationArgs, importance: Tensor | None, gram: Tensor | None
) -> _ErrorMeasure:
    if gram is not None:
        size = args.group_size or weight.shape[1]
        blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])

        def through_gram(errors: Tensor) -> Tensor:
            by_group = errors.transpose(0, 1)
            return torch.bmm(by_group, blocks).mul_(by_group).sum(dim=-1).t()

        return through_gram
    if importance is not None:
        weights = group_columns(importance.float().unsqueeze(0), args)
        return lambda errors: errors.square_().mul_(weights).sum(dim=-1)
    return lambda errors: errors.square_().sum(dim=-1)


def _search_rows(
    weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype, measure: _ErrorMeasure
) -> QuantizationParams:
    """The search on a few rows [rows, in] float32."""
    grouped = group_columns(weight, args)
    low, high = grouped.aminmax(dim=-1)

    def attempt(shrink: Tensor | float) -> tuple[QuantizationParams, Tensor]:
        params = _params_of_range(low * shrink, high * shrink, args, scale_dtype)
        restored = _nearest_codes(grouped, params, args)
        if params.zero_point is not None:
            restored -= params.zero_point.float().unsqueeze(-1)
        restored *= params.scale.float().unsqueeze(-1)
        return params, measure(restored.sub_(grouped))

    best, best_error = attempt(1.0)
    best_shrink = torch.ones_like(best_error)

    def improve(shrink: Tensor) -> None:
        nonlocal best, best_error, best_shrink
        params, error = attempt(shrink)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink = torch.where(better, shrink, best_shrink)
        best = best.where_better(better, params)

    for shrink in _COARSE_SHRINKS:
        improve(torch.tensor(shrink, device=weight.device))
    centre = best_shrink
    for offset in _FINE_OFFSETS:
        improve(centre + offset)
    return best
