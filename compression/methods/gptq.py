"""GPTQ: second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

Columns are rounded one after the other, each after the errors of those before it have been fed back. With
H = L L^T the Gram matrix, d = w - w' one row's errors, and the columns laid out last first,

    d H d^T = |d L|^2 = sum_j L_jj^2 (d_j + sum_{i > j} d_i L_ij / L_jj)^2,

so the walk goes from the last column to the first, and rounds w_j + sum_{i > j} d_i L_ij / L_jj. That is
algorithm 1 without its matrix inverse (Chen et al., 2025, arXiv:2507.18553: GPTQ is Babai's nearest plane
algorithm); its U, with H^-1 = U^T U, holds the same numbers, at the price of inverting L.

The weight is held transposed, [in, out], so that a column is contiguous, and feedback comes at three levels:

    ┌─ block (128 columns) ───────┐
    │      ┌─ sub-block (16) ─┐   │
    │      │ <- one column    │ <-│ <- the columns after the sub-block, then after the block: one product each
    └──────┴──────────────────┴───┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.quantizer import QuantizationParams, QuantizedWeight, code_dtype, round_to_grid
from compression.schemes import QuantizationArgs

_SUB_BLOCK = 16
_MAX_DAMPENING = 1.0


@dataclass(frozen=True)
class GPTQResult:
    """The rounded weight, the dampening that worked, and how many input columns were never non-zero."""

    weight: QuantizedWeight
    dampening_frac: float
    dead_columns: int


def gptq(
    weight: Tensor,
    gram_matrix: Tensor,
    args: QuantizationArgs,
    params: QuantizationParams,
    *,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    actorder: Literal["static"] | None = "static",
) -> GPTQResult:
    """Round `weight` [out, in] so that |X W^T - X W'^T|_F stays small; gram_matrix [in, in] is X^T X.

    Rows are independent, so linears that share an input are solved stacked along out. Scales are fixed before
    the walk. actorder "static" walks columns in order of falling Gram diagonal and leaves groups and scales
    where they are on disk. A dead column (zero diagonal) never reaches the output: its weight becomes 0.

    Raises:
        NumericalError: `singular_gram`, no dampening up to 1.0 makes the Gram matrix positive definite.
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
    factor, worked = dampened_cholesky(gram.index_select(0, order).index_select(1, order), dampening_frac)
    codes = torch.empty(columns.shape, dtype=code_dtype(args), device=columns.device)
    codes[order] = _walk(columns, factor, params, args, order.tolist(), block_size)
    return GPTQResult(QuantizedWeight(codes.t().contiguous(), params, args), worked, int(dead.sum()))


def dampened_cholesky(gram: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Lower L [n, n] with gram + d I = L L^T, and the dampening fraction that worked; `gram` is overwritten.

    d = fraction * mean of the non-zero diagonal entries; a zero entry (a dead column) counts as 1. The
    fraction grows tenfold, up to 1.0, for as long as the factorization fails.

    Raises:
        NumericalError: `singular_gram`.
    """
    diagonal = gram.diagonal().clone()
    live = diagonal != 0
    mean = diagonal.sum() / live.sum().clamp(min=1)
    diagonal.masked_fill_(~live, 1.0)
    fraction = dampening_frac
    while True:
        gram.diagonal().copy_(diagonal + fraction * mean)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return factor, fraction
        if fraction >= _MAX_DAMPENING:
            raise NumericalError(
                "singular_gram",
                f"The Gram matrix is not positive definite, even with dampening {fraction:g}.",
                "Use more calibration tokens, or leave this module out with ignore.",
            )
        fraction = min(10 * fraction, _MAX_DAMPENING)


def _walk(
    columns: Tensor,
    factor: Tensor,
    params: QuantizationParams,
    args: QuantizationArgs,
    order: list[int],
    block_size: int,
) -> Tensor:
    """Codes [in, out] of `columns` [in, out], whose rows become their errors; row i is order[i] on disk.

    `factor` is overwritten too, by the shares L_ij / L_jj.
    """
    n, out = columns.shape
    shares = factor.div_(factor.diagonal().clone())
    groups = [column // (args.group_size or n) for column in order]
    scales = params.scale.t().float().contiguous().unbind()
    zero_points = None if params.zero_point is None else params.zero_point.t().float().contiguous().unbind()

    codes = torch.empty(n, out, dtype=code_dtype(args), device=columns.device)
    targets = columns.new_empty(min(block_size, n), out)
    code = columns.new_empty(out)
    for stop in range(n, 0, -block_size):
        start = max(0, stop - block_size)
        block = targets[: stop - start]
        torch.addmm(columns[start:stop], shares[stop:, start:stop].t(), columns[stop:], out=block)
        for sub_stop in range(stop, start, -_SUB_BLOCK):
            sub_start = max(start, sub_stop - _SUB_BLOCK)
            sub_block = block[sub_start - start : sub_stop - start]
            sub_block.addmm_(shares[sub_stop:stop, sub_start:sub_stop].t(), columns[sub_stop:stop])
            errors = columns[sub_start:sub_stop]
            received = errors.t()
            # the shares of columns that are not rounded yet are zeros: every product has the same shape
            inner = shares[sub_start:sub_stop, sub_start:sub_stop].tril(-1).t().contiguous()
            for target, share, error, stored, group in zip(
                reversed(sub_block.unbind()),
                reversed(inner.unbind()),
                reversed(errors.unbind()),
                reversed(codes[sub_start:sub_stop].unbind()),
                reversed(groups[sub_start:sub_stop]),
                strict=True,
            ):
                scale = scales[group]
                torch.div(target.addmv_(received, share), scale, out=code)
                if zero_points is None:
                    round_to_grid(code, args, out=code)
                    stored.copy_(code)
                else:
                    round_to_grid(code.add_(zero_points[group]), args, out=code)
                    stored.copy_(code)
                    code.sub_(zero_points[group])
                error.addcmul_(code, scale, value=-1)
    return codes
