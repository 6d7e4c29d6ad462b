"""AWQ: channels that matter are scaled up before rounding, and down again in front (arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compression.gram import Gram
from compression.methods.rtn import rtn
from compression.params import group_columns
from compression.quantizer import minmax_params, search_params
from compression.schemes import QuantizationArgs
from compression.steps import AWQ_ROWS, Observer

DuoScaling = bool | Literal["both"]

_SMALLEST_SCALE = 1e-4


class Rounded(NamedTuple):
    """A weight [out, in] float32, and how it will be rounded: the dtype of stored scales, and the observer.

    An observer `gram` is tried as `imatrix`.
    """

    weight: Tensor
    args: QuantizationArgs
    scale_dtype: torch.dtype
    observer: Observer = "minmax"


class SharedChannels(NamedTuple):
    """Input channels that one output row makes, as in grouped-query attention: all get one scale.

    The input is [heads, head_dim], and every `repeats` heads after each other come from the same rows.
    """

    head_dim: int
    repeats: int

    def reduce(self, channels: Tensor) -> Tensor:
        """Means over the channels of each row: [in] -> [in / repeats]."""
        return channels.view(-1, self.repeats, self.head_dim).mean(1).flatten()

    def expand(self, rows: Tensor) -> Tensor:
        """[in / repeats] -> [in]."""
        return rows.view(-1, 1, self.head_dim).expand(-1, self.repeats, -1).flatten()


def awq_scales(
    parts: Sequence[Rounded],
    gram: Gram,
    *,
    n_grid: int = 20,
    duo_scaling: DuoScaling = True,
    shared: SharedChannels | None = None,
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

    gram: of the input, [in, in]. shared: channels that must have one scale.
    """
    x, w = gram.importance().clamp(min=0).sqrt(), _relative_magnitude(parts)
    dead = (x == 0) | (w == 0)
    if shared is not None:
        x, w = shared.expand(shared.reduce(x.square()).sqrt()), shared.expand(shared.reduce(w))
        dead = shared.expand(shared.reduce(dead.float())) > 0
    best, least = torch.ones_like(x), _output_error(parts, gram, torch.ones_like(x))
    for scales in _candidates(x, w, n_grid, duo_scaling):
        tried = _centred(scales, dead)
        error = _output_error(parts, gram, tried)
        if error < least:
            best, least = tried, error
    return best


def _candidates(x: Tensor, w: Tensor, n_grid: int, duo_scaling: DuoScaling) -> Iterator[Tensor]:
    for step in range(n_grid):
        ratio = step / n_grid
        if duo_scaling is not False:
            yield x.pow(ratio) / (w.pow(1 - ratio) + _SMALLEST_SCALE)
        if duo_scaling is not True:
            yield x.pow(ratio)


def _centred(scales: Tensor, dead: Tensor) -> Tensor:
    """Scales divided by the geometric middle of their range; 1 where `dead`."""
    if dead.all():
        return torch.ones_like(scales)
    low, high = scales[~dead].clamp(min=_SMALLEST_SCALE).aminmax()
    return scales.clamp(min=_SMALLEST_SCALE).div(low.sqrt() * high.sqrt()).masked_fill(dead, 1.0)


def _relative_magnitude(parts: Sequence[Rounded]) -> Tensor:
    """Per column, the mean over all rows of |w| / max |w| of its group, [in]."""
    total = torch.zeros_like(parts[0].weight[0])
    for part in parts:
        magnitude = group_columns(part.weight.abs(), part.args)
        largest = magnitude.amax(dim=-1, keepdim=True)
        total += (magnitude / largest.masked_fill(largest == 0, 1.0)).flatten(1).sum(0)
    return total / sum(len(part.weight) for part in parts)


def _output_error(parts: Sequence[Rounded], gram: Gram, scales: Tensor) -> float:
    """tr(D G D^T) of the rows of all parts that are tried; infinite where rounding leaves float32."""
    importance = gram.importance() / scales.square()
    total = 0.0
    for part in parts:
        every = -(-len(part.weight) // AWQ_ROWS)
        rows = part.weight[::every]
        difference = _rounded(rows * scales, part, importance).div_(scales).sub_(rows)
        total += every * float(torch.linalg.vecdot(difference @ gram.matrix, difference).sum())
    return total if total == total else float("inf")


def _rounded(weight: Tensor, part: Rounded, importance: Tensor) -> Tensor:
    """Some rows [rows, in] of a part, scaled, as they become. importance: [in], of their inputs."""
    if part.observer == "minmax":
        params = minmax_params(weight.to(part.scale_dtype), part.args, part.scale_dtype)
        return rtn(weight, part.args, params).dequantize(torch.float32)
    groups, of_groups = weight, importance.expand_as(weight)
    if part.args.strategy != "block":  # what has a scale of its own becomes a row: one search for all of them
        size = part.args.columns or weight.shape[1]
        groups, of_groups = groups.reshape(-1, size), of_groups.reshape(-1, size)
    given = None if part.observer == "mse" else of_groups
    params = search_params(groups, part.args, part.scale_dtype, importance=given)
    return rtn(groups, part.args, params).dequantize(torch.float32).view_as(weight)
