"""One group of linears that share an input: prune, observe, round, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression.checkpoint.reader import TORCH_DTYPES
from compression.gram import Gram
from compression.methods.gptq import gptq
from compression.methods.masks import magnitude_keep, wanda_keep
from compression.methods.rtn import rtn
from compression.methods.sparsegpt import sparsegpt
from compression.plans import ModulePlan
from compression.quantizer import (
    QuantizationParams,
    QuantizedWeight,
    minmax_params,
    require_finite_weight,
    search_params,
)
from compression.recipe import MagnitudeStep, PruningStep, QuantizingStep, Recipe, WandaStep
from compression.report import ModuleReport
from compression.schemes import Scheme


@dataclass(frozen=True)
class Solved:
    """A linear's new weight, a tensor in its stored dtype where no scheme applies, with its report's row."""

    module: ModulePlan
    weight: QuantizedWeight | Tensor
    report: ModuleReport


def solve(
    modules: Sequence[ModulePlan],
    weights: Sequence[Tensor],
    gram: Gram | None,
    recipe: Recipe,
    *,
    smoothed: bool = False,
) -> Iterator[Solved]:
    """Solve linears that read the same tensor; those with the same treatment as one stacked matrix.

    weights: [out_i, in] in any float dtype. gram: statistics of their input, None without data. smoothed: for
    the report.

    Raises:
        NumericalError: `non_finite_weights`, `singular_gram`.
    """
    alike: dict[tuple[int | None, int | None, str], list[tuple[ModulePlan, Tensor]]] = {}
    for module, weight in zip(modules, weights, strict=True):
        alike.setdefault((module.pruning, module.step, module.dtype), []).append((module, weight))
    for (pruning, step, dtype), members in alike.items():
        pruning_step = None if pruning is None else recipe.pruning[pruning]
        quantizing_step = None if step is None else recipe.quantizing[step]
        for solved in _solve_stacked(members, gram, pruning_step, quantizing_step, TORCH_DTYPES[dtype]):
            yield replace(solved, report=replace(solved.report, smoothed=smoothed))


def _solve_stacked(
    members: Sequence[tuple[ModulePlan, Tensor]],
    gram: Gram | None,
    pruning: PruningStep | None,
    step: QuantizingStep | None,
    stored_dtype: torch.dtype,
) -> Iterator[Solved]:
    """Rows are independent and the Gram is shared, so the linears are stacked along out.

    stored_dtype: dtype of the checkpoint's weights, to which scales are rounded and in which readers compute.
    """
    for module, weight in members:
        require_finite_weight(module.name, weight)
    weights = [weight.float() for _, weight in members]
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    scheme = members[0][0].scheme
    keep, dampening_frac, dead_columns = None, None, 0
    if pruning is not None:
        splits = [len(weight) for weight in weights]
        stacked, keep, dampening_frac = _prune(stacked, gram, pruning, splits)
    solution: QuantizedWeight | Tensor
    if step is None or scheme is None:
        solution = stacked.to(stored_dtype)
    else:
        params = _observe(stacked, gram, step, scheme, stored_dtype)
        if step.type == "gptq":
            assert gram is not None  # the plan refuses gptq without a dataset
            result = gptq(
                stacked,
                gram.matrix,
                scheme.weights,
                params,
                block_size=step.block_size,
                dampening_frac=step.dampening_frac,
                actorder=step.actorder,
                keep=keep,
            )
            solution = result.weight
            dampening_frac, dead_columns = result.dampening_frac, result.dead_columns
        else:
            solution = rtn(stacked, scheme.weights, params)

    start = 0
    for (module, _), weight in zip(members, weights, strict=True):
        stop = start + len(weight)
        part = solution[start:stop] if isinstance(solution, Tensor) else solution.rows(start, stop)
        meant = part if isinstance(part, Tensor) else part.dequantize(stored_dtype)
        start = stop
        difference = weight - meant.float()
        report = ModuleReport(
            name=module.name,
            method="+".join(done.type for done in (pruning, step) if done is not None),
            scheme=None if scheme is None else scheme.name,
            group_size=None if scheme is None else scheme.weights.group_size,
            shape=(weight.shape[0], weight.shape[1]),
            weight_error=_ratio(difference.square().sum(), weight.square().sum()),
            relative_error=None if gram is None else _output_error(weight, difference, gram.matrix),
            dampening_frac=dampening_frac,
            dead_columns=dead_columns,
            sparsity=None if pruning is None else float((meant == 0).float().mean()),
            dequantized_sha256=sha256_of(meant),
            tokens=gram.tokens - gram.borrowed if gram is not None and module.experts else None,
        )
        yield Solved(module, part, report)


def _prune(
    weight: Tensor, gram: Gram | None, step: PruningStep, splits: Sequence[int]
) -> tuple[Tensor, Tensor, float | None]:
    """The pruned weight, where it was kept, and the dampening of a method that inverts."""
    if isinstance(step, MagnitudeStep):
        keep = magnitude_keep(weight, step.sparsity, step.structure, splits)
        return weight * keep, keep, None
    assert gram is not None  # the plan refuses the other methods without a dataset
    if isinstance(step, WandaStep):
        keep = wanda_keep(weight, gram.importance(), step.sparsity, step.structure)
        return weight * keep, keep, None
    result = sparsegpt(
        weight,
        gram.matrix,
        sparsity=step.sparsity,
        structure=step.structure,
        splits=splits,
        block_size=step.block_size,
        dampening_frac=step.dampening_frac,
    )
    return result.weight, result.keep, result.dampening_frac


def sha256_of(tensor: Tensor) -> str:
    """Digest of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _observe(
    weight: Tensor, gram: Gram | None, step: QuantizingStep, scheme: Scheme, scale_dtype: torch.dtype
) -> QuantizationParams:
    if step.observer == "minmax":
        return minmax_params(weight.to(scale_dtype), scheme.weights, scale_dtype)
    if step.observer == "mse":
        return search_params(weight, scheme.weights, scale_dtype)
    assert gram is not None  # the plan refuses these observers without a dataset
    if step.observer == "gram":
        return search_params(weight, scheme.weights, scale_dtype, gram=gram.matrix)
    return search_params(weight, scheme.weights, scale_dtype, importance=gram.importance())


def _output_error(weight: Tensor, difference: Tensor, gram: Tensor) -> float:
    """tr(D G D^T) / tr(W G W^T): |X D^T|^2 / |X W^T|^2 over the tokens that the Gram was made of."""
    lost = torch.linalg.vecdot(difference @ gram, difference).sum()
    return _ratio(lost, torch.linalg.vecdot(weight @ gram, weight).sum())


def _ratio(part: Tensor, whole: Tensor) -> float:
    return 0.0 if part == 0 else float(part / whole)
