"""AWQ: channels that matter are scaled up before rounding, and down again in front (arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from compression.math.gram import Gram
from compression.math.grid import group_columns, rtn
from compression.math.scaling import Readers, ToRound
from compression.math.search import minmax_params, search_params

DuoScaling = bool | Literal["both"]

_SMALLEST_SCALE = 1e-4


def awq_scales(
    readers: Readers, *, n_grid: int = 20, duo_scaling: DuoScaling = True, rows: int = 128
) -> Tensor:
    """Scales s [in] float32 by which linears that read one tensor are multiplied before they are rounded.

    Searched over s = x^r / w^(1 - r), with duo_scaling, and s = x^r without ("both" tries both), r in n_grid
    even steps of [0, 1); the one wins with the least output error (equation 4)
        tr(D G D^T),  D = Q(W diag(s)) diag(s)^-1 - W,  G = X^T X,
    which needs no forward pass; Q rounds to nearest with the scales that the observer finds. s = 1 is tried
    as well: the result is not worse than no scales at all. x is the root mean square of a channel (the mean
    magnitude, the paper's, is not in the Gram matrix), w the mean over rows of a weight's magnitude in parts
    of its group's largest. A channel without activations or weights is left alone. The geometric middle of
    the smallest and the largest s is 1.

    rows: how many of each linear are tried, evenly spread (docs/adr/0017-awq-tries-what-is-written.md).
    """
    parts, gram, shared = readers.to_round, readers.gram, readers.shared
    x, w = gram.importance().clamp(min=0).sqrt(), _relative_magnitude(parts)
    dead = (x == 0) | (w == 0)
    if shared is not None:
        x, w = shared.expand(shared.reduce(x.square()).sqrt()), shared.expand(shared.reduce(w))
        dead = shared.expand(shared.reduce(dead.float())) > 0
    tried = [torch.ones_like(x), *(_centred(s, dead) for s in _candidates(x, w, n_grid, duo_scaling))]
    errors = torch.stack([_output_error(parts, gram, scales, rows) for scales in tried])
    return torch.stack(tried).index_select(0, errors.argmin(keepdim=True))[0]


def _candidates(x: Tensor, w: Tensor, n_grid: int, duo_scaling: DuoScaling) -> Iterator[Tensor]:
    for step in range(n_grid):
        ratio = step / n_grid
        if duo_scaling is not False:
            yield x.pow(ratio) / (w.pow(1 - ratio) + _SMALLEST_SCALE)
        if duo_scaling is not True:
            yield x.pow(ratio)


def _centred(scales: Tensor, dead: Tensor) -> Tensor:
    """Scales divided by the geometric middle of their range; 1 where `dead`."""
    scales = scales.clamp(min=_SMALLEST_SCALE)
    low, high = scales.masked_fill(dead, torch.inf).amin(), scales.masked_fill(dead, 0.0).amax()
    return scales.div(low.sqrt() * high.sqrt()).masked_fill(dead, 1.0)


def _relative_magnitude(parts: Sequence[ToRound]) -> Tensor:
    """Per column, the mean over all rows of |w| / max |w| of its group, [in]."""
    total = torch.zeros_like(parts[0].weight[0])
    for part in parts:
        magnitude = group_columns(part.weight.abs(), part.args)
        largest = magnitude.amax(dim=-1, keepdim=True)
        total += (magnitude / largest.masked_fill(largest == 0, 1.0)).flatten(1).sum(0)
    return total / sum(len(part.weight) for part in parts)


def _output_error(parts: Sequence[ToRound], gram: Gram, scales: Tensor, most: int) -> Tensor:
    """tr(D G D^T) of the rows that are tried, `most` of each part; infinite where rounding leaves float32.

    A float64 number where the weights lie, so that a GPU is not waited for.
    """
    importance = gram.importance() / scales.square()
    total = scales.new_zeros((), dtype=torch.float64)
    for part in parts:
        every = -(-len(part.weight) // most)
        rows = part.weight[::every]
        difference = _rounded(rows * scales, part, importance).div_(scales).sub_(rows)
        total += every * torch.linalg.vecdot(difference @ gram.matrix, difference).sum().double()
    return total.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _rounded(weight: Tensor, part: ToRound, importance: Tensor) -> Tensor:
    """Some rows [rows, in] of a part, scaled, as they become. importance: [in], of their inputs."""
    if part.observer == "minmax":
        params = minmax_params(weight, part.args, part.scale_dtype)
    else:
        given = None if part.observer == "mse" else importance
        params = search_params(weight, part.args, part.scale_dtype, importance=given)
    return rtn(weight, part.args, params).dequantize(torch.float32)
