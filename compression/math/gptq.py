"""GPTQ: second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

Columns are changed one after the other, each after the errors of those before it have been fed back. The same
walk serves SparseGPT. With H = L L^T the Gram matrix, d = w - w' one row's errors, and the columns laid out
last first,

    d H d^T = |d L|^2 = sum_j L_jj^2 (d_j + sum_{i > j} d_i L_ij / L_jj)^2,

so the walk goes from the last column to the first, and column j aims at w_j + sum_{i > j} d_i L_ij / L_jj:
what is missing of that costs L_jj^2 times its square, whatever the columns before it do. This is the walk of
the papers without their matrix inverse (Chen et al., 2025, arXiv:2507.18553: GPTQ is Babai's nearest plane
algorithm); their U, with H^-1 = U^T U, holds the same numbers, at the price of inverting L.

The weight is held transposed, [in, out], so that a column is contiguous, and feedback comes at three levels:

    ┌─ block (128 columns) ───────┐
    │      ┌─ sub-block (16) ─┐   │
    │      │ <- one column    │ <-│ <- the columns after the sub-block, then after the block: one product each
    └──────┴──────────────────┴───┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.math.finite import all_finite
from compression.math.grid import QuantizationParams, QuantizedWeight, Rounded, code_dtype, round_to_grid
from compression.schemes import QuantizationArgs

SUB_BLOCK = 16
"""Columns between two products of feedback inside a block."""
_MAX_DAMPENING = 1.0

LookAhead = Callable[[Tensor, int], None]
"""Looks at a block or sub-block [columns, out] before its columns are changed, as it would be if none of them
were: all errors so far made up for. And the number of its first column."""


def gptq(
    weight: Tensor,
    gram_matrix: Tensor,
    args: QuantizationArgs,
    params: QuantizationParams,
    *,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    actorder: Literal["static"] | None = "static",
    keep: Tensor | None = None,
) -> Rounded:
    """Round `weight` [out, in] so that |X W^T - X W'^T|_F stays small; gram_matrix [in, in] is X^T X.

    Rows are independent, so linears that share an input are solved stacked along out. Scales are fixed before
    the walk. actorder "static" walks columns in order of falling Gram diagonal and leaves groups and scales
    where they are on disk. A dead column (zero diagonal) never reaches the output: its weight becomes 0.
    keep: bool [out, in], where it is False the result is 0 (what pruning left stays pruned).

    Raises:
        NumericalError: `singular_gram`, no dampening up to 1.0 makes the Gram matrix positive definite;
            `weights_out_of_range`, as `walk` says.
    """
    gram = gram_matrix.float()
    diagonal = gram.diagonal()
    if actorder == "static":
        order = diagonal.argsort(stable=True)
    else:
        order = torch.arange(len(diagonal) - 1, -1, -1, device=gram.device)
    dead = diagonal[order] == 0
    columns = weight.t().float().contiguous().index_select(0, order)
    columns[dead] = 0.0
    kept = None if keep is None else keep.t().index_select(0, order).float().unbind()
    factor, worked = dampened_cholesky(gram.index_select(0, order).index_select(1, order), dampening_frac)

    by_row = params.by_row(args, len(weight))
    scales = by_row.scale.t().contiguous().unbind()
    shifts = None if by_row.zero_point is None else by_row.zero_point.t().float().contiguous().unbind()
    scale_group = [column // (args.columns or len(order)) for column in order.tolist()]
    codes = torch.empty(
        columns.shape, dtype=code_dtype(args), device=columns.device
    )  # row i: column order[i]
    stored, code = codes.unbind(), columns.new_empty(columns.shape[1])
    for target, error, column in walk(columns, factor, block_size=block_size):
        scale = scales[scale_group[column]]
        torch.div(target, scale, out=code)
        if shifts is None:
            round_to_grid(code, args, out=code)
        else:
            shift = shifts[scale_group[column]]
            round_to_grid(code.add_(shift), args, out=code).sub_(shift)
        if args.type == "float":
            code.copysign_(target)
        if kept is not None:
            code.mul_(kept[column])
        stored[column].copy_(code if shifts is None else code + shift)
        error.addcmul_(code, scale, value=-1)
    on_disk = torch.empty_like(codes)
    on_disk[order] = codes
    return Rounded(QuantizedWeight(on_disk.t().contiguous(), params, args), worked, int(dead.sum()))


def walk(
    columns: Tensor,
    factor: Tensor,
    *,
    block_size: int,
    sub_block: int = SUB_BLOCK,
    enter_block: LookAhead | None = None,
    enter_sub_block: LookAhead | None = None,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Visit all `columns` [in, out], the last first; their rows become their errors.

    For each column yields (target, error, number). target [out]: the column with all feedback. error [out]:
    the column as it was, from which the caller subtracts what it decides. factor: lower L [in, in]; it is
    overwritten by the shares L_ij / L_jj.

    Raises:
        NumericalError: `weights_out_of_range`, an error is beyond float32, or its scale is.
    """
    n, out = columns.shape
    shares = factor.div_(factor.diagonal().clone())
    targets = columns.new_empty(min(block_size, n), out)
    for stop in range(n, 0, -block_size):
        start = max(0, stop - block_size)
        block = targets[: stop - start]
        torch.addmm(columns[start:stop], shares[stop:, start:stop].t(), columns[stop:], out=block)
        if enter_block:
            enter_block(_made_up(columns[start:stop], block, shares[start:stop, start:stop]), start)
        for sub_stop in range(stop, start, -sub_block):
            sub_start = max(start, sub_stop - sub_block)
            sub_targets = block[sub_start - start : sub_stop - start]
            sub_targets.addmm_(shares[sub_stop:stop, sub_start:sub_stop].t(), columns[sub_stop:stop])
            if enter_sub_block:
                inner = shares[sub_start:sub_stop, sub_start:sub_stop]
                enter_sub_block(_made_up(columns[sub_start:sub_stop], sub_targets, inner), sub_start)
            errors = columns[sub_start:sub_stop]
            received = errors.t()
            # the shares of columns that are not changed yet are zeros: every product has the same shape
            inner = shares[sub_start:sub_stop, sub_start:sub_stop].tril(-1).t().contiguous()
            for target, share, error, column in zip(
                reversed(sub_targets.unbind()),
                reversed(inner.unbind()),
                reversed(errors.unbind()),
                range(sub_stop - 1, sub_start - 1, -1),
                strict=True,
            ):
                yield target.addmv_(received, share), error, column
    if not all_finite(columns):
        raise NumericalError(
            "weights_out_of_range",
            "The weights are so large that errors leave the range of float32, or scales that of their dtype.",
            "Leave this module out with ignore, or convert the checkpoint to a dtype with a wider range.",
        )


def _made_up(columns: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """What `columns` become when each of them reaches its target, the feedback of the others included.

    targets: with the feedback of later columns only; shares: among these columns, unit lower triangular.
    """
    errors = torch.linalg.solve_triangular(shares.t(), columns - targets, upper=True, unitriangular=True)
    made_up: Tensor = columns - errors
    return made_up


def dampened_cholesky(gram: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Lower L [n, n] with gram + d I = L L^T, and the dampening fraction that worked; `gram` is overwritten.

    d = fraction * mean of the non-zero diagonal entries; a zero entry (a dead column) counts as 1. The
    fraction doubles, up to 1.0, for as long as the factorization fails; the report warns where it did.

    Raises:
        NumericalError: `singular_gram`.
    """
    diagonal = gram.diagonal().clone()
    live = diagonal != 0
    mean = diagonal.double().sum() / live.sum().clamp(min=1)
    diagonal.masked_fill_(~live, 1.0)
    fraction = dampening_frac
    while True:
        gram.diagonal().copy_(diagonal + fraction * mean)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) == 0 and all_finite(factor.diagonal()):
            return factor, fraction
        if fraction >= _MAX_DAMPENING:
            raise NumericalError(
                "singular_gram",
                f"The Gram matrix of the input is not positive definite, even with dampening {fraction:g}.",
                "Use more calibration tokens, or leave this module out with ignore.",
            )
        fraction = min(2 * fraction, _MAX_DAMPENING)
