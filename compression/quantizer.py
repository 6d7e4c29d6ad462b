"""Grids, scales and codes: how a float tensor becomes integers (or fp8, or fp4) and comes back.

    weight [out, in]  --minmax_params / search_params-->  QuantizationParams (scale, zero_point, global_scale)
                      --quantize-->                       codes int8 | float8_e4m3fn [out, in]
                      --QuantizedWeight.dequantize-->     what a reader of the checkpoint computes

A code q stands for (q - zero_point) * step, the step being what the stored scale means. Arithmetic is in
float32 (rounding in bfloat16 moves 8% of int8 codes), with scales that are already rounded to the dtype in
which they are stored. fp4 (e2m1) codes are held in float8_e4m3fn, which has all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.finite import all_finite
from compression.params import (
    QuantizationParams,
    global_scale_of,
    group_columns,
    over_rows,
    params_of_range,
    rows_sharing,
    spanning_params,
    to_rows,
)
from compression.schemes import QuantizationArgs

_COARSE_SHRINKS = (1.16, 1.08, 0.92, 0.84, 0.76, 0.68, 0.60, 0.52, 0.44)
_FINE_STEPS = (0.04, 0.02, 0.01)
"""Shrinks of the min-max range that a search tries; within 0.5% of the error that 180 even steps reach."""

_SEARCH_ROWS, _SEARCH_ELEMENTS = (256, 4096), 1 << 19
"""Rows whose group is searched at once: between these, as many as have so many elements."""

_CHUNK_ELEMENTS = 1 << 16
"""Weights rounded at once: with the two temporaries, what two cores hold in their level-2 caches."""


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
        """Output rows start to stop, where each has scales of its own: one linear out of a stacked solve."""
        return QuantizedWeight(self.codes[start:stop], self.params.rows(start, stop), self.args)


def require_finite_weight(name: str, weight: Tensor) -> None:
    """Refuse NaN and Inf in the weight of module `name`.

    Raises:
        NumericalError: `non_finite_weights`.
    """
    if not all_finite(weight):
        raise NumericalError(
            "non_finite_weights",
            f"The weight of {name} holds NaN or Inf.",
            "The source checkpoint is damaged: download it again.",
        )


def require_finite_result(name: str, weight: Tensor) -> None:
    """Refuse a compressed weight of module `name`, as readers get it, for which its dtype is too narrow.

    Raises:
        NumericalError: `weights_out_of_range`.
    """
    if not all_finite(weight):
        raise NumericalError(
            "weights_out_of_range",
            f"The weight of {name} is so large that it leaves {weight.dtype} when it is compressed.",
            "Leave this module out with ignore, or convert the checkpoint to a dtype with a wider range.",
        )


def require_finite_input_scale(name: str, scale: Tensor) -> None:
    """Refuse what calibration fixes of the input of module `name` where its dtype is too narrow.

    Raises:
        NumericalError: `non_finite_activations`.
    """
    if not all_finite(scale):
        raise NumericalError(
            "non_finite_activations",
            f"The input of {name} holds numbers beyond {scale.dtype}, in which its scale is stored.",
            "Use a scheme that finds this at run time, such as FP8_DYNAMIC, or convert the checkpoint to a "
            "dtype with a wider range.",
        )


def minmax_params(weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> QuantizationParams:
    """Scales that span the smallest to the largest weight that share one, zero included.

    Computed in `scale_dtype`, step by step, as compressed-tensors does (`calculate_qparams`): the same bits.
    """
    return spanning_params(weight, args, scale_dtype).as_stored(args)


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
        sum importance * e^2               importance [in] = E[x^2] (observer imatrix), or [out, in], that of
                                           each row,
        e G e^T                            gram [in, in] = X^T X, G its block for the group (observer gram):
                                           Hessian-weighted MSE, the output error this group alone causes,
    and summed over the rows that share a scale. A coarse grid of shrinks is tried on every group, then each
    group's best is refined by halving steps.
    """
    if importance is not None and gram is not None:
        raise ValueError("give importance or gram, not both")
    params = spanning_params(weight, args, scale_dtype)
    rows, columns = weight.shape
    size, sharing = args.columns or columns, rows_sharing(args, rows)
    scales = params.scale.view(-1, columns // size)
    fewest, most = _SEARCH_ROWS
    at_once = max(sharing, min(most, max(fewest, _SEARCH_ELEMENTS // size)) // sharing * sharing)
    for group, start in enumerate(range(0, columns, size)):
        part = slice(start, start + size)
        for top in range(0, rows, at_once):
            chunk = weight[top : top + at_once, part].t().float().contiguous()
            cost = _error_cost(slice(top, top + at_once), part, weight.device, importance, gram)
            found = _search_group(chunk, args, scale_dtype, cost, params.global_scale)
            here = slice(top // sharing, top // sharing + len(found.scale))
            scales[here, group] = found.scale
            if params.zero_point is not None and found.zero_point is not None:
                params.zero_point[here, group] = found.zero_point
    return params.as_stored(args)


def quantize(weight: Tensor, params: QuantizationParams, args: QuantizationArgs) -> Tensor:
    """Codes [out, in] nearest to the weight [out, in], int8 or float8_e4m3fn; ties to even, clamped."""
    by_row = params.by_row(args, len(weight))
    scaled = group_columns(weight.float(), args) / by_row.scale.unsqueeze(-1)
    if by_row.zero_point is not None:
        scaled += by_row.zero_point.float().unsqueeze(-1)
    return round_to_grid(scaled, args, out=scaled).flatten(1).to(code_dtype(args))


def code_dtype(args: QuantizationArgs) -> torch.dtype:
    """The dtype that holds codes in memory."""
    return torch.float8_e4m3fn if args.type == "float" else torch.int8


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
        low, high = values.aminmax(dim=-1, keepdim=True)
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


def round_to_grid(values: Tensor, args: QuantizationArgs, out: Tensor) -> Tensor:
    """The code nearest to each scaled value, in the values' float dtype; `out` may be `values` itself."""
    torch.clamp(values, *args.range, out=out)
    if args.type == "int":
        return out.round_()
    if args.num_bits == 4:
        magnitude = out.abs()
        spacing = torch.ones_like(out).masked_fill_(magnitude < 2, 0.5).masked_fill_(magnitude >= 4, 2.0)
        return out.div_(spacing).round_().mul_(spacing)
    return out.copy_(out.to(torch.float8_e4m3fn))


_Cost = Callable[[Tensor, slice], Tensor]
"""Errors [group_size, rows], which it may overwrite, and which rows these are -> what each costs, [rows]."""


def _error_cost(
    rows: slice, columns: slice, device: torch.device, importance: Tensor | None, gram: Tensor | None
) -> _Cost:
    if gram is not None:
        block = gram[columns, columns].float().contiguous()
        return lambda errors, _rows: (block @ errors).mul_(errors).sum(dim=0)
    if importance is not None and importance.dim() == 2:
        each = importance[rows, columns].t().float()
        return lambda errors, rows: errors.square_().mul_(each[:, rows]).sum(dim=0)
    size = columns.stop - columns.start
    weights = torch.ones(size, device=device) if importance is None else importance[columns].float()
    return lambda errors, _rows: torch.mv(errors.square_().t(), weights)


def _search_group(
    weights: Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    cost: _Cost,
    global_scale: Tensor | None,
) -> QuantizationParams:
    """The best parameters [scales] for one group's weights [group_size, rows], float32.

    Transposed, so that a scale per row runs along memory. Errors are taken in steps of each row's own scale.
    """
    rows = weights.shape[1]
    sharing = rows_sharing(args, rows)
    low, high = weights.aminmax(dim=0)
    low, high = over_rows(low, sharing, torch.amin), over_rows(high, sharing, torch.amax)
    unit = params_of_range(low, high, args, scale_dtype, global_scale).steps(args)

    def best_of(shrinks: Tensor) -> _Found:
        """Of the shrinks [tries, scales], the best for each scale."""
        params = params_of_range(low * shrinks, high * shrinks, args, scale_dtype, global_scale)
        steps = params.steps(args)
        costs = _costs(weights, to_rows(steps, sharing, rows), params.zero_point, args, cost)
        # relative to the unit: finite for huge and tiny weights
        costs *= to_rows((steps / unit).square_(), sharing, rows)
        # a range beyond float32 gives NaN, which must not win
        costs = over_rows(costs.nan_to_num_(nan=torch.inf, posinf=torch.inf), sharing, torch.sum)
        least, index = costs.min(dim=0, keepdim=True)
        return _Found(least[0], shrinks.gather(0, index)[0], params.gather(index))

    coarse = torch.tensor((1.0, *_COARSE_SHRINKS), device=weights.device)
    best = best_of(coarse.unsqueeze(1).expand(-1, len(low)))
    for step in _FINE_STEPS:
        found = best_of(torch.stack((best.shrink - step, best.shrink + step)))
        better = found.cost < best.cost
        best = _Found(
            torch.where(better, found.cost, best.cost),
            torch.where(better, found.shrink, best.shrink),
            best.params.where(better, found.params),
        )
    return best.params


def _costs(
    weights: Tensor, scales: Tensor, zero_point: Tensor | None, args: QuantizationArgs, cost: _Cost
) -> Tensor:
    """What rounding weights [group_size, rows] by each of scales [tries, rows] costs, in squared steps."""
    shifts = None if zero_point is None else zero_point.float()
    costs = torch.empty_like(scales)
    width = max(64, _CHUNK_ELEMENTS // weights.shape[0])
    for left in range(0, weights.shape[1], width):
        rows = slice(left, left + width)
        part = weights[:, rows].contiguous()
        scaled, codes = torch.empty_like(part), torch.empty_like(part)
        for attempt in range(scales.shape[0]):
            torch.div(part, scales[attempt, rows], out=scaled)
            if shifts is not None:
                scaled.add_(shifts[attempt, rows])
            round_to_grid(scaled, args, out=codes)
            costs[attempt, rows] = cost(codes.sub_(scaled), rows)
    return costs


class _Found(NamedTuple):
    """A group's best parameters so far, [rows] each: their cost and the shrink that gave them."""

    cost: Tensor
    shrink: Tensor
    params: QuantizationParams
