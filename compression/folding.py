"""One fold: scales leave the input of a group of linears and enter their weights; the function stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.checkpoint.reader import TORCH_DTYPES
from compression.methods.smoothquant import fold_norm, smoothing_scales
from compression.model import StreamedModel
from compression.plans import FoldPlan
from compression.streams import Group, Streams

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Rounding of a norm's result, in parts of its largest magnitude: a fold that changes more is not one."""


@dataclass(frozen=True)
class Fold:
    """weights: of the group's linears, [out, in]. norm: its tensors to write, by key, in their stored dtype.

    done: whether anything changed; a fold that would change the function is not made.
    """

    weights: list[Tensor]
    norm: dict[str, Tensor]
    done: bool


def fold(
    planned: FoldPlan, group: Group, model: StreamedModel, streams: Streams, smoothing_strength: float
) -> Fold:
    """Smooth one group, parked before its linears: the norm in the model and the parked inputs change."""
    stored = {key: TORCH_DTYPES[model.checkpoint.tensors[key].dtype] for key in planned.keys}
    before = {key: model.module.get_parameter(key).to(dtype) for key, dtype in stored.items()}
    weights = model.weights(module.name for module in group.modules)
    assert group.inputs is not None  # the plan refuses smoothing without a dataset
    scales = smoothing_scales(group.inputs, weights, smoothing_strength)
    weight, bias = (before.get(f"{planned.norm}.{suffix}") for suffix in ("weight", "bias"))
    assert weight is not None  # the plan folds into norms that have one
    folded = fold_norm(weight, bias, scales, offset=planned.offset)
    read_before = _sample(group)
    after = {f"{planned.norm}.weight": folded.weight}
    if folded.bias is not None:
        after[f"{planned.norm}.bias"] = folded.bias
    model.set_parameters(after)
    streams.renew_inputs(planned)
    error = (_sample(group) * folded.scales - read_before).abs().amax()
    if not error <= _TOLERANCE[model.compute_dtype] * read_before.abs().amax():
        model.set_parameters(before)
        streams.renew_inputs(planned)
        return Fold(weights, before, done=False)
    return Fold([weight.float() * folded.scales for weight in weights], after, done=True)


def _sample(group: Group) -> Tensor:
    """What the first batch hands to the group, float32, a copy."""
    assert group.inputs is not None
    return next(iter(group.inputs)).to(torch.float32, copy=True)
