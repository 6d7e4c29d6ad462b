"""Scales that leave a tensor and enter the linears that read it: what SmoothQuant and AWQ have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compression.math.gram import Gram
from compression.schemes import Observer, QuantizationArgs


class ToRound(NamedTuple):
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


class Readers(NamedTuple):
    """Linears that read one tensor, and that tensor: what scales are chosen for.

    inputs: the tensor in every batch, [..., in]. gram: of it. weights: of all linears, [out, in] in any float
    dtype. to_round: of those that a later step quantizes. shared: channels that must have one scale.
    """

    inputs: Iterable[Tensor]
    gram: Gram
    weights: Sequence[Tensor]
    to_round: Sequence[ToRound]
    shared: SharedChannels | None = None


class FoldedNorm(NamedTuple):
    """A norm that divides its output by `scales`.

    weight, bias: [features], as stored. scales: [features] float32, what they really divide by, rounding to
    their dtype included: multiplied into the linears, they leave the function as it was.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor


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
