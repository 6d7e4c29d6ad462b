"""How far a compressed weight is from the original, by itself and behind what its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.math.sizes import COMPARED_ROWS


def errors_of(weight: Tensor, meant: Tensor, gram: Tensor | None) -> tuple[float, float | None]:
    """|D|^2 / |W|^2 and tr(D G D^T) / tr(W G W^T) = |X D^T|^2 / |X W^T|^2, with D = W - W'.

    The latter is None without data, and where X W^T is zero and X D^T is not. Weights are taken in units of
    the largest, inputs in units of the loudest: no square of them leaves float32.
    """
    unit = weight.abs().amax()
    if unit == 0:
        return 0.0, None if gram is None else 0.0
    loudest = weight.new_zeros(()) if gram is None else gram.diagonal().amax().sqrt()
    norms, traces = weight.new_zeros(2, 2, dtype=torch.float64)  # each of D and of W
    for part, meant_part in zip(
        torch.split(weight, COMPARED_ROWS), torch.split(meant, COMPARED_ROWS), strict=True
    ):
        both = torch.stack([part - meant_part.float(), part]).div_(unit)
        norms += both.square().sum((1, 2))
        if gram is not None and loudest > 0:
            both.div_(loudest)
            traces += (both @ gram).mul_(both).sum((1, 2))
    weight_error = float(norms[0] / norms[1])
    if gram is None:
        return weight_error, None
    lost, whole = traces.tolist()
    if lost <= 0:  # or what rounding makes of 0
        return weight_error, 0.0
    return weight_error, lost / whole if whole > 0 else None
