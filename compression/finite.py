"""Whether a tensor holds NaN or Inf."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """By the extremes of a tensor that is not empty, NaN being one: `torch.isfinite` takes up to seven bytes
    a number, which for the largest matrices is more than they have themselves."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
