"""Scales of a weight: observers, from the plain range of the weights to a search for the least error.

minmax   the range of the weights that share a scale
mse      shrinks of that range are tried; the least squared error of the weights wins
imatrix  the same, each column weighted by E[x^2] of its input
gram     the same, the error measured through the Gram matrix: the output error that a group alone causes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compression.math.gram import Gram
from compression.math.grid import (
    QuantizationParams,
    global_scale_of,
    group_columns,
    over_rows,
    params_of_range,
    round_to_grid,
    rows_sharing,
    to_rows,
)
from compression.schemes import Observer, QuantizationArgs

_COARSE_SHRINKS = (1.16, 1.08, 0.92, 0.84, 0.76, 0.68, 0.60, 0.52, 0.44)
_FINE_STEPS = (0.04, 0.02, 0.01)
"""Shrinks of the min-max range that a search tries; within 0.5% of the error that 180 even steps reach."""

_SEARCH_ROWS, _SEARCH_ELEMENTS = (256, 4096), 1 << 19
"""Rows whose group is searched at once: between these, as many as have so many elements."""

_CHUNK_ELEMENTS = 1 << 16
"""Weights rounded at once: with the two temporaries, what two cores hold in their level-2 caches."""


def observe(
    weight: Tensor,
    gram: Gram | None,
    observer: Observer | None,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
) -> QuantizationParams:
    """The parameters of `weight` [out, in] float32, as they are stored. gram: of its input."""
    if observer == "minmax":
        return minmax_params(weight.to(scale_dtype), args, scale_dtype)
    if observer == "mse":
        return search_params(weight, args, scale_dtype)
    assert gram is not None  # the plan refuses these observers without a dataset
    if observer == "gram":
        return search_params(weight, args, scale_dtype, gram=gram.matrix)
    return search_params(weight, args, scale_dtype, importance=gram.importance())


def minmax_params(weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> QuantizationParams:
    """Scales that span the smallest to the largest weight that share one, zero included.

    Computed in `scale_dtype`, step by step, as compressed-tensors does (`calculate_qparams`): the same bits.
    """
    return spanning_params(weight, args, scale_dtype).as_stored(args)


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
