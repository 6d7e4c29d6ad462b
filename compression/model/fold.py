"""Folds: scales leave the input of a group of linears and enter their weights; the function stays.

In front of a group stands a norm, which is folded into while batches are parked behind it; or a linear
whose output rows are the group's channels (v to o, up to down), which is folded into before the layer is
begun. Each fold is tried on the first batch, and undone where it would change the function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compression.checkpoint.reader import TORCH_DTYPES
from compression.math.finite import all_finite
from compression.math.gram import Gram, accumulate_gram, require_finite_gram
from compression.math.scaling import Readers, SharedChannels, ToRound, fold_norm
from compression.methods import method_of
from compression.model.activations import Activations, LinearGroup
from compression.model.streamed import StreamedModel
from compression.planning.plans import FoldPlan, LayerPlan, LinearFoldPlan, ModulePlan
from compression.recipe import Recipe

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Rounding of a group's input, in parts of its largest magnitude: a fold that changes more is not one."""
_TRIED_TOKENS = 512
"""Tokens on which a fold is tried."""


@dataclass(frozen=True)
class Fold:
    """weights: of the group's linears, [out, in]. gram: of what they read now.

    norm: its tensors to write, by key, in their stored dtype. done: whether anything changed.
    """

    weights: list[Tensor]
    gram: Gram
    norm: dict[str, Tensor]
    done: bool


@dataclass(frozen=True)
class LinearFolds:
    """What a layer's linear folds changed: weights by module, float32; biases to write, by key; groups."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)


def fold(
    planned: FoldPlan,
    group: LinearGroup,
    weights: Sequence[Tensor],
    gram: Gram,
    model: StreamedModel,
    activations: Activations,
    recipe: Recipe,
) -> Fold:
    """Smooth one group, parked before its linears: the norm in the model and the parked inputs change.

    weights: of the group's linears, [out, in] each. gram: of what they read.
    """
    step = recipe.smoothing
    assert step is not None
    assert group.inputs is not None  # the plan refuses smoothing without a dataset
    stored = {key: TORCH_DTYPES[model.checkpoint.tensors[key].dtype] for key in planned.keys}
    before = {key: model.module.get_parameter(key).to(dtype) for key, dtype in stored.items()}
    readers = Readers(group.inputs, gram, weights, _to_round(group.modules, weights, recipe))
    scales: Tensor = method_of(step).solve(readers, **step.options)
    weight, bias = (before.get(f"{planned.norm}.{suffix}") for suffix in ("weight", "bias"))
    assert weight is not None  # the plan folds into norms that have one
    folded = fold_norm(weight, bias, scales, offset=planned.offset)
    read_before = _sample(group.inputs)
    after = {f"{planned.norm}.weight": folded.weight}
    if folded.bias is not None:
        after[f"{planned.norm}.bias"] = folded.bias
    model.set_parameters(after)
    activations.renew_inputs(planned)
    scaled = [weight.float() * folded.scales for weight in weights]
    same = _same(read_before, _sample(group.inputs) * folded.scales, [model.compute_dtype, *_biases(before)])
    if not (same and all(map(all_finite, scaled))):
        model.set_parameters(before)
        activations.renew_inputs(planned)
        return Fold(list(weights), gram, before, done=False)
    return Fold(scaled, gram.divided(folded.scales), after, done=True)


def fold_linears(
    layer: LayerPlan,
    model: StreamedModel,
    activations: Activations,
    recipe: Recipe,
) -> LinearFolds:
    """Search and fold the scales between a layer's own linears, on batches at its entry, for methods that do.

    Weights and biases change in the model. What the scales are searched on is a rehearsal of the layer with
    the weights that its linears have then, not compressed yet.
    """
    folds = LinearFolds()
    step = recipe.smoothing
    for planned in layer.linear_folds:
        assert step is not None
        members = [module for module in layer.modules if module.group == planned.group]
        inputs = activations.rehearsed(layer.index, planned.group)
        gram = accumulate_gram(inputs)
        require_finite_gram(planned.group, gram)
        shared = _shared_channels(planned, len(gram.matrix))
        weights = model.weights(member.name for member in members)
        readers = Readers(inputs, gram, weights, _to_round(members, weights, recipe), shared)
        scales: Tensor = method_of(step).solve(readers, **step.options)
        rows = scales if shared is None else shared.reduce(scales)
        _fold_linear(planned, members, scales, rows, inputs, model, folds)
    return folds


def _fold_linear(
    planned: LinearFoldPlan,
    members: Sequence[ModulePlan],
    scales: Tensor,
    rows: Tensor,
    inputs: Iterable[Tensor],
    model: StreamedModel,
    folds: LinearFolds,
) -> None:
    """Divide the last rows of a linear by `rows` and multiply the columns of its readers by `scales`."""
    names = [member.name for member in members]
    (held,) = model.weights([planned.linear])
    weights = {planned.linear: _with_rows_divided(held, rows)}
    weights |= {n: w.float() * scales for n, w in zip(names, model.weights(names), strict=True)}
    stored = {key: TORCH_DTYPES[model.checkpoint.tensors[key].dtype] for key in planned.keys}
    before = {key: model.module.get_parameter(key).to(dtype) for key, dtype in stored.items()}
    biases = {key: _with_rows_divided(bias, rows).to(bias.dtype) for key, bias in before.items()}
    read_before = _sample(inputs)
    model.set_weights({planned.linear: weights[planned.linear]})
    model.set_parameters(biases)
    same = _same(read_before, _sample(inputs) * scales, [model.compute_dtype, *_biases(before)])
    if same and all(map(all_finite, weights.values())):
        model.set_weights(weights)
        folds.weights.update(weights)
        folds.biases.update(biases)
        folds.groups.add(planned.group)
    else:
        model.set_weights({planned.linear: held})
        model.set_parameters(before)
        folds.biases.update(before)


def _with_rows_divided(tensor: Tensor, rows: Tensor) -> Tensor:
    """A weight [out, in] or bias [out], its last len(rows) rows divided by `rows`; float32."""
    kept = len(tensor) - len(rows)
    divisors = torch.cat((torch.ones_like(rows[:1]).expand(kept), rows))
    return tensor.float() / divisors.view(-1, *[1] * (tensor.dim() - 1))


def _to_round(modules: Sequence[ModulePlan], weights: Sequence[Tensor], recipe: Recipe) -> list[ToRound]:
    """The linears of a group that will be rounded, in float32, for methods that try how; what is only pruned
    has no part in that."""
    assert recipe.smoothing is not None
    if not method_of(recipe.smoothing).tries_rounding:
        return []
    parts = []
    for module, weight in zip(modules, weights, strict=True):
        if module.scheme is not None and module.step is not None:
            observer = recipe.quantizing[module.step].observer
            assert observer is not None  # the plan writes it out
            dtype = TORCH_DTYPES[module.dtype]
            parts.append(ToRound(weight.float(), module.scheme.weights, dtype, observer))
    return parts


def _shared_channels(planned: LinearFoldPlan, columns: int) -> SharedChannels | None:
    repeats = columns // planned.rows
    return SharedChannels(planned.head_dim, repeats) if repeats > 1 else None


def _sample(inputs: Iterable[Tensor]) -> Tensor:
    """What the first tokens of the first batch hand to the group, [tokens, in] float32, a copy."""
    return next(iter(inputs)).flatten(0, -2)[:_TRIED_TOKENS].to(torch.float32, copy=True)


def _biases(tensors: Mapping[str, Tensor]) -> list[torch.dtype]:
    """The dtypes to which folded biases are rounded. A norm's weight counts as it is after rounding."""
    return [tensor.dtype for key, tensor in tensors.items() if key.endswith(".bias")]


def _same(before: Tensor, after: Tensor, dtypes: Iterable[torch.dtype]) -> bool:
    """Equal but for rounding to these dtypes."""
    error, largest = (after - before).abs().amax(), before.abs().amax()
    return bool(error <= max(_TOLERANCE[dtype] for dtype in dtypes) * largest)
