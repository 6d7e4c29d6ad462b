"""GPTQ: second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

Columns are rounded one after the other; the error of each is spread over the columns not yet rounded, by
the upper Cholesky factor U of the inverse Gram matrix (H^-1 = U^T U). The weight is held transposed,
[in, out], so that a column is contiguous, and the spreading is done at two levels:

    ┌──────────── block (128 columns) ───────────┐
    │ sub-block (16) │ rest of the block         │ columns after the block
    │ q e q e q e .. │ <- 16 errors, one product │ <- 128 errors, one product
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
    columns = weight.t().float().contiguous()
    gram = gram_matrix.float()
    dead = gram.diagonal() == 0
    order = torch.arange(gram.shape[0], device=gram.device)
    if actorder == "static":
        order = gram.diagonal().argsort(descending=True, stable=True)
    dead = dead[order]
    columns = columns[order]  # a copy, which the walk overwrites
    columns[dead] = 0.0
    factor, worked = inverse_factor(gram[order][:, order], dampening_frac)
    walked = _walk(columns, factor, params, args, order.tolist(), block_size)
    codes = torch.empty_like(walked)
    codes[order] = walked
    result = QuantizedWeight(codes.t().contiguous(), params, args)
    return GPTQResult(result, worked, int(dead.sum()))


def inverse_factor(gram: Tensor, dampening_frac: float) -> tuple[Tensor, float]:
    """Upper U [n, n] with (gram + d I)^-1 = U^T U, and the dampening fraction that worked.

    d = fraction * mean of the non-zero diagonal entries. A zero entry (a dead column) becomes 1 first. The
    fraction grows tenfold, up to 1.0, as long as the Cholesky factorization fails. One factorization of the
    reversed matrix is enough: with J the reversal, J H J = L L^T gives U = J L^-1 J.

    Raises:
        NumericalError: `singular_gram`.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    reversed_gram = gram.flip(0, 1)
    reversed_gram.diagonal()[dead.flip(0)] = 1.0
    fraction = dampening_frac
    while True:
        damped = reversed_gram.clone()
        damped.diagonal().add_(fraction * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1), fraction
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
    """Codes [in, out] of `columns` [in, out], which it overwrites; row i of both is column order[i] on disk.

    Errors are kept undivided by U_ii, and the rows of U divided instead: one operation less a column.
    """
    n, out = columns.shape
    spread = factor / factor.diagonal().unsqueeze(1)
    group_size = args.group_size or n
    groups = [column // group_size for column in order]
    scales = params.scale.t().float().contiguous().unbind()
    zero_points = None if params.zero_point is None else params.zero_point.t().float().contiguous().unbind()

    codes = torch.empty(n, out, dtype=code_dtype(args), device=columns.device)
    errors = columns.new_zeros(min(block_size, n), out)
    code = columns.new_empty(out)
    for start in range(0, n, block_size):
        stop = min(start + block_size, n)
        for sub_start in range(start, stop, _SUB_BLOCK):
            sub_stop = min(sub_start + _SUB_BLOCK, stop)
            sub_errors = errors[sub_start - start : sub_stop - start]
            received = sub_errors.t()
            # shares of the sub-block's earlier errors, zero for later ones, so that every product has one shape
            shares = spread[sub_start:sub_stop, sub_start:sub_stop].triu(1).t().contiguous()
            for column, share, error, stored, group in zip(
                columns[sub_start:sub_stop].unbind(),
                shares.unbind(),
                sub_errors.unbind(),
                codes[sub_start:sub_stop].unbind(),
                groups[sub_start:sub_stop],
                strict=True,
            ):
                scale = scales[group]
                column.addmv_(received, share, alpha=-1)
                torch.div(column, scale, out=code)
                if zero_points is None:
                    round_to_grid(code, args, out=code)
                    stored.copy_(code)
                else:
                    round_to_grid(code.add_(zero_points[group]), args, out=code)
                    stored.copy_(code)
                    code.sub_(zero_points[group])
                torch.addcmul(column, code, scale, value=-1, out=error)
            columns[sub_stop:stop].addmm_(spread[sub_start:sub_stop, sub_stop:stop].t(), sub_errors, alpha=-1)
        columns[stop:].addmm_(spread[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    return codes
