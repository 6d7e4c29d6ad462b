"""One group of linears that share an input: prune, observe, round, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression.checkpoint.reader import TORCH_DTYPES
from compression.errors import NumericalError
from compression.gram import Gram
from compression.methods.gptq import GPTQResult, gptq
from compression.methods.masks import magnitude_keep, wanda_keep
from compression.methods.rtn import rtn
from compression.methods.sparsegpt import sparsegpt
from compression.observers import observe, stack_by_row
from compression.planning.plans import ModulePlan
from compression.quantizer import (
    QuantizedWeight,
    fixed_input_scale,
    require_finite_input_scale,
    require_finite_result,
    require_finite_weight,
)
from compression.recipe import Recipe
from compression.report import ModuleReport
from compression.schemes import Scheme
from compression.steps import MagnitudeStep, PruningStep, QuantizingStep, WandaStep

_ROWS = 512
"""Rows of a weight whose error is measured at once."""


@dataclass(frozen=True)
class Solved:
    """A linear's new weight, a tensor in its stored dtype where no scheme applies, with its report's row.

    fixed_input: [1], how its activations are quantized, where that is fixed before run time.
    """

    module: ModulePlan
    weight: QuantizedWeight | Tensor
    report: ModuleReport
    fixed_input: Tensor | None = None


def solve(
    modules: Sequence[ModulePlan],
    weights: Sequence[Tensor],
    gram: Gram | None,
    recipe: Recipe,
    *,
    largest_input: Tensor | None = None,
    smoothed: bool = False,
) -> Iterator[Solved]:
    """Solve linears that read the same tensor; those with the same treatment as one stacked matrix.

    weights: [out_i, in] in any float dtype. gram, largest_input: statistics of their input and its largest
    magnitude, None without data. smoothed: for the report.

    Raises:
        NumericalError: `non_finite_weights`, `non_finite_activations`, `singular_gram`,
            `weights_out_of_range`; the message names the linears.
    """
    alike: dict[tuple[int | None, int | None, str, str], list[tuple[ModulePlan, Tensor]]] = {}
    for module, weight in zip(modules, weights, strict=True):
        key = (module.pruning, module.step, module.dtype, module.name if module.solved_alone(recipe) else "")
        alike.setdefault(key, []).append((module, weight))
    for (pruning, step, dtype, _), members in alike.items():
        pruning_step = None if pruning is None else recipe.pruning[pruning]
        quantizing_step = None if step is None else recipe.quantizing[step]
        stored_dtype, scheme = TORCH_DTYPES[dtype], members[0][0].scheme
        fixed_input = None
        if scheme is not None and scheme.fixed_input is not None:
            assert scheme.input_activations is not None
            assert largest_input is not None  # the plan refuses these schemes without a dataset
            fixed_input = fixed_input_scale(largest_input, scheme.input_activations, stored_dtype)
            require_finite_input_scale(members[0][0].group, fixed_input)
        for solved in _solve_stacked(members, gram, pruning_step, quantizing_step, stored_dtype):
            report = replace(solved.report, smoothed=smoothed)
            yield replace(solved, report=report, fixed_input=fixed_input)


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
    scheme = members[0][0].scheme
    rows = [len(weight) for _, weight in members]
    names = [module.name for module, _ in members]
    original = _stack([weight for _, weight in members])
    stacked = original
    keep, dampening_frac, dead_columns = None, None, 0
    solution: Sequence[Tensor] | Sequence[QuantizedWeight]
    with _naming(names):
        if pruning is not None:
            stacked, keep, dampening_frac = _prune(stacked, gram, pruning, rows)
        if step is None or scheme is None:
            solution = torch.split(stacked.to(stored_dtype), rows)
        else:
            solution, found = _quantize(names, stacked, rows, gram, step, scheme, stored_dtype, keep)
            if found is not None:
                dampening_frac, dead_columns = found.dampening_frac, found.dead_columns
    del stacked
    for (module, _), weight, part in zip(members, torch.split(original, rows), [*solution], strict=True):
        meant = part if isinstance(part, Tensor) else part.dequantize(stored_dtype)
        require_finite_result(module.name, meant)
        weight_error, relative_error = _errors(weight, meant, None if gram is None else gram.matrix)
        report = ModuleReport(
            name=module.name,
            method="+".join(done.type for done in (pruning, step) if done is not None),
            scheme=None if scheme is None else scheme.name,
            group_size=None if scheme is None else scheme.weights.group_size,
            shape=(weight.shape[0], weight.shape[1]),
            weight_error=weight_error,
            relative_error=relative_error,
            dampening_frac=dampening_frac,
            dead_columns=dead_columns,
            sparsity=None if pruning is None else float((meant == 0).float().mean()),
            dequantized_sha256=sha256_of(meant),
            tokens=gram.tokens - gram.borrowed if gram is not None and module.experts else None,
        )
        yield Solved(module, part, report)


def _stack(weights: Sequence[Tensor]) -> Tensor:
    """Weights along out, in float32."""
    if len(weights) == 1:
        return weights[0].float()
    shape = (sum(map(len, weights)), weights[0].shape[1])
    return torch.cat([*weights], out=weights[0].new_empty(shape, dtype=torch.float32))


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


def _quantize(
    names: Sequence[str],
    stacked: Tensor,
    rows: Sequence[int],
    gram: Gram | None,
    step: QuantizingStep,
    scheme: Scheme,
    stored_dtype: torch.dtype,
    keep: Tensor | None,
) -> tuple[list[QuantizedWeight], GPTQResult | None]:
    """The linears that `stacked` has so many rows of, with parameters of their own; what GPTQ says of it."""
    args = scheme.weights
    observed = observe(names, stacked, rows, gram, step.observer, args, stored_dtype)
    params = stack_by_row(observed, args, rows)
    result = None
    if step.type == "gptq":
        assert gram is not None  # the plan refuses gptq without a dataset
        result = gptq(
            stacked,
            gram.matrix,
            args.by_row,
            params,
            block_size=step.block_size,
            dampening_frac=step.dampening_frac,
            actorder=step.actorder,
            keep=keep,
        )
    solution = rtn(stacked, args.by_row, params) if result is None else result.weight
    codes = torch.split(solution.codes, list(rows))
    return [QuantizedWeight(*each, args) for each in zip(codes, observed, strict=True)], result


def sha256_of(tensor: Tensor) -> str:
    """Digest of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Methods see tensors only: what they raise gets the names of the linears that are solved."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(error.code, f"{', '.join(names)}: {error.message}", error.hint) from error


def _errors(weight: Tensor, meant: Tensor, gram: Tensor | None) -> tuple[float, float | None]:
    """|D|^2 / |W|^2 and tr(D G D^T) / tr(W G W^T) = |X D^T|^2 / |X W^T|^2, with D = W - W'.

    The latter is None without data, and where X W^T is zero and X D^T is not. Weights are taken in units of
    the largest, inputs in units of the loudest: no square of them leaves float32.
    """
    unit = weight.abs().amax()
    if unit == 0:
        return 0.0, None if gram is None else 0.0
    loudest = weight.new_zeros(()) if gram is None else gram.diagonal().amax().sqrt()
    norms, traces = weight.new_zeros(2, 2, dtype=torch.float64)  # each of D and of W
    for part, meant_part in zip(torch.split(weight, _ROWS), torch.split(meant, _ROWS), strict=True):
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
