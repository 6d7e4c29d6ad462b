"""Scales of a weight: observers, from the plain range of the weights to a search for the least error.

minmax   the range of the weights that share a scale
mse      scales around that of the range are tried; the least squared error of the weights wins
imatrix  the same, each column weighted by E[x^2] of its input
gram     the same, the error measured through the Gram matrix: the output error that a group alone causes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from compression.math.gram import Gram
from compression.math.grid import (
    QuantizationParams,
    extremes,
    global_scale_of,
    group_columns,
    over_rows,
    params_of_range,
    round_to_grid,
    rows_sharing,
    to_rows,
)
from compression.schemes import Observer, QuantizationArgs

Rounds = Sequence[tuple[float, ...]]
"""What a search tries: first scales so far from that of the range, then so far from the best yet.
Chosen on layers of SmolLM2-135M (docs/adr/0043-what-a-search-of-scales-tries.md)."""

_SHRINKS: Rounds = (
    (0.0, 0.16, 0.08, -0.08, -0.16, -0.24, -0.32, -0.40, -0.48, -0.56),
    (-0.04, 0.04),
    (-0.02, 0.02),
    (-0.01, 0.01),
)
"""Parts of the range. Within 0.5% of the error that 180 even steps reach, for int4."""

_UNINFORMED: dict[tuple[str, int], Rounds] = {
    ("int", 4): ((0.0, 0.07, -0.06, -0.12, -0.18, -0.24), (-0.025, 0.025), (-0.01, 0.01)),
    ("int", 8): ((0.0, -0.016, -0.008, 0.008, 0.016, 0.024),),
    ("float", 8): ((0.0, 0.25, 0.4, 0.55, 0.75, 0.9, 1.15),),
}
"""The same where all columns count alike, by type and bits. With 8 bits, cutting off the largest weight costs
more than it gives: how codes happen to fall is what is left. A float's are the same at twice the range."""

_POWERS_OF_TWO: Rounds = ((0, 1, -1, -2),)
"""Exponents of MXFP4: what all parts of the range together come to. Those of MXFP8 leave nothing to gain."""

_FLOAT8_STEPS: Rounds = ((0, 1, 2, 3, 4, 5, 6, -1, -2),)
"""Steps among the float8 numbers that are scales of NVFP4. Four or five steps on, the largest weight is at 4
instead of 6, where codes are closer together (arXiv:2512.02010)."""

_SEARCH_ELEMENTS = 1 << 20
"""Weights that are searched for at once, with a scale for each column. With fewer, calls have no work."""

_CHUNK_ELEMENTS = 1 << 17
"""Weights rounded at once: with the temporaries, what two cores hold in their level-2 caches."""


def observer_of(
    observer: Observer | None, gram: Gram | None
) -> Callable[[Tensor, QuantizationArgs, torch.dtype], QuantizationParams]:
    """What finds the scales of a weight: `minmax_params`, or `search_params` with what it knows of the input.

    gram: of the input.
    """
    if observer == "minmax":
        return minmax_params
    if observer == "mse":
        return search_params
    assert gram is not None  # the plan refuses these observers without a dataset
    if observer == "gram":
        return partial(search_params, gram=gram.matrix)
    return partial(search_params, importance=gram.importance())


def minmax_params(weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> QuantizationParams:
    """Scales that span the smallest to the largest weight that share one, zero included.

    Computed in `scale_dtype`, step by step, as compressed-tensors does (`calculate_qparams`): the same bits.
    """
    rows, columns = weight.shape
    low, high = extremes(group_columns(weight, args), -1)
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
    """Scales whose rounding error is least, of some around that of the range; never worse than min-max.

    The error e = w - w' of one row's group is measured as
        sum e^2                            without statistics (observer mse),
        sum importance * e^2               importance [in] = E[x^2] (observer imatrix),
        e G e^T                            gram [in, in] = X^T X, G its block for the group (observer gram):
                                           Hessian-weighted MSE, the output error this group alone causes,
    and summed over the rows that share a scale. `_rounds` says what is tried.
    """
    if importance is not None and gram is not None:
        raise ValueError("give importance or gram, not both")
    params = minmax_params(weight, args, scale_dtype)
    informed = importance is not None or gram is not None
    rounds = [_on(weight.device, moves) for moves in _rounds(args, informed=informed)]
    if not rounds:
        return params
    rows, columns = weight.shape
    size, sharing = args.columns or columns, rows_sharing(args, rows)
    if sharing == 1 and gram is None:
        weight = weight.reshape(-1, size)  # each group becomes a row: as many at once as there is work for
    if importance is not None:
        importance = importance.reshape(-1, weight.shape[1])
    shape = (-1, weight.shape[1] // size)
    scales = params.scale.view(shape)
    zero_points = None if params.zero_point is None else params.zero_point.view(shape)
    at_once = max(1, _SEARCH_ELEMENTS // size // sharing) * sharing
    for group, start in enumerate(range(0, weight.shape[1], size)):
        part = slice(start, start + size)
        for top in range(0, len(weight), at_once):
            chunk = weight[top : top + at_once, part].t().float().contiguous()
            here = slice(top // sharing, (top + at_once) // sharing)
            zero_point = None if zero_points is None else zero_points[here, group]
            spanning = QuantizationParams(scales[here, group], zero_point, params.global_scale)
            cost = _error_cost(chunk, part, top, importance, gram)
            scales[here, group] = _search(chunk, spanning, args, cost, rounds)
    return params


_Cost = Callable[[Tensor, slice, Tensor], Tensor]
"""Of errors [group_size, rows], which it may overwrite, and which rows these are: what each row costs [rows],
written to the last argument."""


def _error_cost(
    chunk: Tensor, columns: slice, top: int, importance: Tensor | None, gram: Tensor | None
) -> _Cost:
    """What errors of a chunk [group_size, rows] cost, which begins at row `top`.

    importance: [groups, columns], that of each row; more rows than groups have the same, over and over.
    """
    if gram is not None:
        block = gram[columns, columns].float().contiguous()
        return lambda errors, _rows, out: torch.sum((block @ errors).mul_(errors), dim=0, out=out)
    if importance is None or len(importance) == 1:
        weights = chunk.new_ones(len(chunk)) if importance is None else importance[0, columns].float()
        return lambda errors, _rows, out: torch.mv(errors.square_().t(), weights, out=out)
    whose = torch.arange(top, top + chunk.shape[1], device=chunk.device) % len(importance)
    each = importance[whose, columns].t().float()
    return lambda errors, rows, out: torch.sum(errors.square_().mul_(each[:, rows]), dim=0, out=out)


def _rounds(args: QuantizationArgs, *, informed: bool) -> Rounds:
    """What is tried for scales of this kind: parts of the range; where scales are few, steps among them.

    informed: columns count by their inputs, so that what only unimportant ones reach may be cut off.
    """
    if args.scale_dtype == "E8M0":
        return _POWERS_OF_TWO if args.num_bits == 4 else ()
    if args.scale_dtype == "F8_E4M3":
        return _FLOAT8_STEPS
    if informed or (args.num_bits == 4 and args.columns is None):  # among many weights one is far off
        return _SHRINKS
    return _UNINFORMED.get((args.type, args.num_bits), _SHRINKS)


@cache
def _on(device: torch.device, moves: tuple[float, ...]) -> Tensor:
    """[tries, 1] float32, copied to the device once."""
    return torch.tensor(moves, dtype=torch.float32, device=device).unsqueeze(1)


def _search(
    weights: Tensor,
    spanning: QuantizationParams,
    args: QuantizationArgs,
    cost: _Cost,
    rounds: Sequence[Tensor],
) -> Tensor:
    """The best scales [scales] for weights [group_size, rows], float32, whose range is that of `spanning`.

    Transposed, so that a scale per row runs along memory. Errors are taken in steps of each row's own scale.
    Zero points stay: low and high ends are cut off, or given room, in proportion.
    """
    size, rows = weights.shape
    sharing = rows_sharing(args, rows)
    zero_point = spanning.zero_point
    shift = None if zero_point is None else to_rows(zero_point.float(), sharing, rows)
    unit = spanning.steps(args)
    place, least = torch.zeros_like(unit), torch.full_like(unit, torch.inf)
    best = spanning.moved(place, args).scale
    width = max(64, _CHUNK_ELEMENTS // size)
    for moves in rounds:
        places = place + moves  # [tries, scales]
        tried = spanning.moved(places, args)
        steps = tried.steps(args)
        factors = to_rows(1 / steps, sharing, rows)
        costs = torch.empty_like(factors)
        for left in range(0, rows, width):
            here = slice(left, left + width)
            part = weights[:, here]
            codes, spare = part.new_empty(2, *part.shape)
            for factor, row_costs in zip(factors[:, here], costs[:, here], strict=True):
                if shift is None:
                    torch.mul(part, factor, out=codes)
                else:
                    torch.addcmul(shift[here], part, factor, out=codes)
                round_to_grid(codes, args, out=codes, spare=spare)
                if shift is not None:
                    codes.sub_(shift[here])
                cost(codes.addcmul_(part, factor, value=-1), here, row_costs)
        # relative to the unit: finite for huge and tiny weights
        costs *= to_rows((steps / unit).square_(), sharing, rows)
        # a range beyond float32 gives NaN, which must not win
        costs = over_rows(costs.nan_to_num_(nan=torch.inf, posinf=torch.inf), sharing, torch.sum)
        cheapest, index = costs.min(dim=0, keepdim=True)
        better = cheapest[0] < least
        best = torch.where(better, tried.scale.gather(0, index)[0], best)
        place = torch.where(better, places.gather(0, index)[0], place)
        least = torch.minimum(least, cheapest[0])
    return best
