"""How far a compressed weight is from the original, by itself and behind what its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.math.sizes import COMPARED_ROWS


def errors_of(weight: Tensor, meant: Tensor, gram: Tensor | None) -> tuple[float, float | None]:
    """|D|^2 / |W|^2 and tr(D G D^T) / tr(W G W^T) = |X D^T|^2 / |X W^T|^2, with D = W - W'.

    weight, meant: [out, in], the latter in any float dtype. gram: [in, in] float32. The second is None
    without data, where X W^T is zero and X D^T is not, and where so little is left of tr(D G D^T) that the
    rounding of G to float32 outweighs it: even a float64 product is negative then, and there is no telling.
    """
    weight_error, lost, whole = _measured(weight, meant, gram, torch.float32)
    if gram is not None and lost < 0:
        _, lost, whole = _measured(weight, meant, gram, torch.float64)
    if gram is None or lost < 0:
        return weight_error, None
    if lost == 0:
        return weight_error, 0.0
    return weight_error, lost / whole if whole > 0 else None


def _measured(
    weight: Tensor, meant: Tensor, gram: Tensor | None, dtype: torch.dtype
) -> tuple[float, float, float]:
    """|D|^2 / |W|^2, and tr(D G D^T) and tr(W G W^T) in a common unit; products in `dtype`, sums in float64.

    Weights are taken in units of the largest, inputs in units of the loudest: no square of them leaves
    float32.
    """
    unit = weight.abs().amax()
    if unit == 0:
        return 0.0, 0.0, 0.0
    loudest = weight.new_zeros(()) if gram is None else gram.diagonal().amax().sqrt()
    norms, traces = weight.new_zeros(2, 2, dtype=torch.float64)  # each of D and of W
    parts = (torch.split(each, COMPARED_ROWS) for each in (weight, meant))
    for part, meant_part in zip(*parts, strict=True):
        both = torch.stack([part - meant_part.float(), part]).div_(unit)
        norms += both.square().sum((1, 2))
        if gram is not None and loudest > 0:
            both = both.to(dtype).div_(loudest)
            traces += (both @ gram.to(dtype)).mul_(both).sum((1, 2))
    lost, whole = traces.tolist()
    return float(norms[0] / norms[1]), lost, whole
