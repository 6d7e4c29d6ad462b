"""SmoothQuant: outliers of activations are moved into the weights that read them (arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from compression.math.scaling import Readers

_SMALLEST_SCALE = 1e-5


def smoothquant_scales(readers: Readers, *, smoothing_strength: float = 0.5) -> Tensor:
    """`smoothing_scales` as a method of the registry."""
    return smoothing_scales(readers.inputs, readers.weights, smoothing_strength)


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


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """Per column, the largest magnitude in all rows of all tensors, float32."""
    return torch.stack([t.reshape(-1, t.shape[-1]).abs().amax(0).float() for t in tensors]).amax(0)
