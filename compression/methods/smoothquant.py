"""SmoothQuant: outliers of activations are moved into the weights that read them (arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST_SCALE = 1e-5


class FoldedNorm(NamedTuple):
    """A norm that divides its output by `scales`.

    weight, bias: [features], as stored. scales: [features] float32, what they really divide by, rounding to
    their dtype included: multiplied into the linears, they leave the function as it was.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor


def smoothing_scales(
    inputs: Iterable[Tensor], weights: Iterable[Tensor], smoothing_strength: float
) -> Tensor:
    """s_j = max|X_j|^a / max|W_j|^(1 - a), equation 4; a = smoothing_strength.

    inputs: what the linears read, each [..., in]. weights: of all linears that read it, each [out, in].
    Returns float32 [in]. A channel without activations or weights is left alone (s = 1).
    """
    activation = _largest(inputs)
    weight = _largest(weights)
    scales = activation.pow(smoothing_strength) / weight.pow(1 - smoothing_strength)
    dead = (activation == 0) | (weight == 0)
    return scales.clamp(min=_SMALLEST_SCALE).masked_fill(dead, 1.0)


def fold_norm(weight: Tensor, bias: Tensor | None, scales: Tensor, *, offset: float) -> FoldedNorm:
    """Divide a norm's output by `scales` [features].

    weight, bias: in the dtype they are stored in, to which the results are rounded. The norm multiplies with
    offset + weight. A channel whose folded factor would round to zero, or leave its dtype, is left alone.
    """
    factor = weight.float() + offset
    folded = (factor / scales - offset).to(weight.dtype)
    rounded = folded.float() + offset
    keep = (rounded == 0) | (factor == 0) | ~torch.isfinite(rounded)
    folded = torch.where(keep, weight, folded)
    effective = torch.where(keep, 1.0, factor / rounded)
    return FoldedNorm(folded, None if bias is None else (bias.float() / effective).to(bias.dtype), effective)


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """Per column, the largest magnitude in all rows of all tensors, float32."""
    return torch.stack([t.reshape(-1, t.shape[-1]).abs().amax(0).float() for t in tensors]).amax(0)
