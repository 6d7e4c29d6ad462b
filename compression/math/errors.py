"""How far a compressed weight is from the original, by itself and behind what its inputs are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compression.math.sizes import COMPARED_ROWS

_FLOAT64_ROWS = COMPARED_ROWS // 4
_NOISE = 10 * 2.0**-24
"""A trace below so many |D|^2 |G|_F may be 1% off in float32, and is found in float64."""


def errors_of(weight: Tensor, meant: Tensor, gram: Tensor | None) -> tuple[float, float | None]:
    """|D|^2 / |W|^2 and tr(D G D^T) / tr(W G W^T) = |X D^T|^2 / |X W^T|^2, with D = W - W'.

    weight, meant: [out, in], the latter in any float dtype. gram: [in, in] float32. The second is None
    without data, where X W^T is zero and X D^T is not, and where so little is left of tr(D G D^T) that the
    rounding of G to float32 outweighs it: even a float64 product is negative then, and there is no telling.

    Weights are taken in units of the largest, inputs in units of the loudest: no square of them leaves
    float32. Rows are summed in float32, what they sum to in float64. The device is waited for once, and again
    where the trace is so small that float64 has to find it.
    """
    unit = _or_one(weight.abs().amax())
    norms, traces = weight.new_zeros(2, 2, dtype=torch.float64)  # each of D and of W
    loudest = noise = None
    if gram is not None:
        loudest = _or_one(gram.diagonal().amax().sqrt())
        noise = _NOISE * gram.norm(dim=1).double().norm() / loudest.square()
    for part, meant_part in _parts(weight, meant, COMPARED_ROWS):
        both = _difference_and_weight(part, meant_part, unit)
        norms += both.square().sum(2).double().sum(1)
        if gram is not None and loudest is not None:
            both /= loudest
            traces += (both @ gram).mul_(both).sum(2).double().sum(1)
    found = torch.cat([norms, traces, norms[:1] * (0.0 if noise is None else noise)])
    difference, size, lost, whole, least_sure = found.tolist()
    weight_error = difference / size if size > 0 else 0.0
    if gram is None or loudest is None:
        return weight_error, None
    if lost < least_sure:
        lost, whole = _traces_in_float64(weight, meant, gram, unit, loudest).tolist()
    if lost < 0:
        return weight_error, None
    if lost == 0:
        return weight_error, 0.0
    return weight_error, lost / whole if whole > 0 else None


def _traces_in_float64(weight: Tensor, meant: Tensor, gram: Tensor, unit: Tensor, loudest: Tensor) -> Tensor:
    """tr(D G D^T) and tr(W G W^T), [2]; parts are so small that they take no more than float32 ones."""
    traces = gram.new_zeros(2, dtype=torch.float64)
    for left in range(0, len(gram), _FLOAT64_ROWS):
        columns = slice(left, left + _FLOAT64_ROWS)
        panel = gram[:, columns].double()
        for part, meant_part in _parts(weight, meant, _FLOAT64_ROWS):
            both = _difference_and_weight(part, meant_part, unit).double().div_(loudest)
            traces += (both @ panel).mul_(both[..., columns]).sum((1, 2))
    return traces


def _parts(weight: Tensor, meant: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(weight, rows), torch.split(meant, rows), strict=True)


def _difference_and_weight(weight: Tensor, meant: Tensor, unit: Tensor) -> Tensor:
    return torch.stack([weight - meant.float(), weight]).div_(unit)


def _or_one(unit: Tensor) -> Tensor:
    """What to divide by: 1 where all is 0."""
    return torch.where(unit == 0, 1.0, unit)
