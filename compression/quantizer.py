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

_COARSE_SHRINKS = (1.16, 1.08, 0.92, 0.84, 0.76, 0.68, 0.60, 0.52, 0.44)
_FINE_STEPS = (0.04, 0.02, 0.01)
"""Shrinks of the min-max range that a search tries; within 0.5% of the error that 180 even steps reach."""

_SEARCH_ROWS = 4096
"""Rows whose group is searched at once, which bounds the memory of a search."""

_CHUNK_ELEMENTS = 1 << 16
"""Weights rounded at once: with the two temporaries, what two cores hold in their level-2 caches."""


class QuantizationParams(NamedTuple):
    """scale [out, groups] in the stored dtype; zero_point [out, groups] int8, None when symmetric.

    groups is in / group_size, and 1 for one scale per channel.
    """

    scale: Tensor
    zero_point: Tensor | None

    def where(self, condition: Tensor, other: QuantizationParams) -> QuantizationParams:
        """`other` where `condition` holds, else these."""
        zero_point = self.zero_point
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(condition, other.zero_point, zero_point)
        return QuantizationParams(torch.where(condition, other.scale, self.scale), zero_point)

    def gather(self, index: Tensor) -> QuantizationParams:
        """From parameters [tries, rows], those of try index [1, rows]: [rows]."""
        zero_point = None if self.zero_point is None else self.zero_point.gather(0, index)[0]
        return QuantizationParams(self.scale.gather(0, index)[0], zero_point)

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
    if not torch.isfinite(weight).all():
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
    A coarse grid of shrinks is tried on every group, then each group's best is refined by halving steps.
    """
    if importance is not None and gram is not None:
        raise ValueError("give importance or gram, not both")
    params = minmax_params(weight, args, scale_dtype)
    size = args.group_size or weight.shape[1]
    for group, start in enumerate(range(0, weight.shape[1], size)):
        columns = slice(start, start + size)
        cost = _error_cost(size, weight.device, importance, gram, columns)
        for top in range(0, weight.shape[0], _SEARCH_ROWS):
            chunk = slice(top, top + _SEARCH_ROWS)
            found = _search_group(weight[chunk, columns].t().float().contiguous(), args, scale_dtype, cost)
            params.scale[chunk, group] = found.scale
            if params.zero_point is not None and found.zero_point is not None:
                params.zero_point[chunk, group] = found.zero_point
    return params


def quantize(weight: Tensor, params: QuantizationParams, args: QuantizationArgs) -> Tensor:
    """Codes [out, in] nearest to the weight [out, in], int8 or float8_e4m3fn; ties to even, clamped."""
    scaled = group_columns(weight.float(), args) / params.scale.float().unsqueeze(-1)
    if params.zero_point is not None:
        scaled += params.zero_point.float().unsqueeze(-1)
    return round_to_grid(scaled, args, out=scaled).flatten(1).to(code_dtype(args))


def code_dtype(args: QuantizationArgs) -> torch.dtype:
    """The dtype that holds codes in memory."""
    return torch.float8_e4m3fn if args.type == "float" else torch.int8


def fake_quantize(x: Tensor, args: QuantizationArgs) -> Tensor:
    """Activations [..., features] rounded per token as compressed-tensors' quantized forward rounds them.

    Symmetric min-max scale per token, every step in x's dtype, as a reader of the checkpoint does.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale, _ = _params_of_range(low, high, args, x.dtype)
    scaled = x / scale
    return round_to_grid(scaled, args, out=scaled).mul_(scale)


def round_to_grid(values: Tensor, args: QuantizationArgs, out: Tensor) -> Tensor:
    """The code nearest to each scaled value, in the values' float dtype; `out` may be `values` itself."""
    torch.clamp(values, *args.range, out=out)
    if args.type == "float":
        return out.copy_(out.to(torch.float8_e4m3fn))
    return out.round_()


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
    eps = torch.finfo(scale_dtype).eps
    return QuantizationParams(scale.masked_fill_(scale == 0, eps), zero_point)


_Cost = Callable[[Tensor], Tensor]
"""Errors [group_size, rows], which it may overwrite -> what each row's error costs, [rows]."""


def _error_cost(
    size: int, device: torch.device, importance: Tensor | None, gram: Tensor | None, columns: slice
) -> _Cost:
    if gram is not None:
        block = gram[columns, columns].float().contiguous()
        return lambda errors: (block @ errors).mul_(errors).sum(dim=0)
    weights = torch.ones(size, device=device) if importance is None else importance[columns].float()
    return lambda errors: torch.mv(errors.square_().t(), weights)


def _search_group(
    weights: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype, cost: _Cost
) -> QuantizationParams:
    """The best parameters [rows] for one group's weights [group_size, rows], float32.

    Transposed, so that a scale per row runs along memory. Errors are taken in steps of each row's own scale.
    """
    low, high = weights.aminmax(dim=0)
    unit = _params_of_range(low, high, args, scale_dtype).scale.float()

    def best_of(shrinks: Tensor) -> _Found:
        """Of the shrinks [tries, rows], the best for each row."""
        params = _params_of_range(low * shrinks, high * shrinks, args, scale_dtype)
        costs = _costs(weights, params, args, cost)
        costs *= (params.scale.float() / unit).square_()  # relative: finite for huge and tiny weights
        # a range beyond float32 gives NaN, which must not win
        least, index = costs.nan_to_num_(nan=torch.inf, posinf=torch.inf).min(dim=0, keepdim=True)
        return _Found(least[0], shrinks.gather(0, index)[0], params.gather(index))

    coarse = torch.tensor((1.0, *_COARSE_SHRINKS), device=weights.device)
    best = best_of(coarse.unsqueeze(1).expand(-1, weights.shape[1]))
    for step in _FINE_STEPS:
        found = best_of(torch.stack((best.shrink - step, best.shrink + step)))
        better = found.cost < best.cost
        best = _Found(
            torch.where(better, found.cost, best.cost),
            torch.where(better, found.shrink, best.shrink),
            best.params.where(better, found.params),
        )
    return best.params


def _costs(weights: Tensor, params: QuantizationParams, args: QuantizationArgs, cost: _Cost) -> Tensor:
    """What rounding weights [group_size, rows] by each of params [tries, rows] costs, in squared steps."""
    scales = params.scale.float()
    shifts = None if params.zero_point is None else params.zero_point.float()
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
            costs[attempt, rows] = cost(codes.sub_(scaled))
    return costs


class _Found(NamedTuple):
    """A group's best parameters so far, [rows] each: their cost and the shrink that gave them."""

    cost: Tensor
    shrink: Tensor
    params: QuantizationParams
