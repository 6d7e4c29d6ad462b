"""Columns are changed one after the other, each after the errors of those before it have been fed back.

What GPTQ and SparseGPT have in common. With H = L L^T the Gram matrix, d = w - w' one row's errors, and the
columns laid out last first,

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

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.finite import all_finite

SUB_BLOCK = 16
_MAX_DAMPENING = 1.0


class ChangeColumn(Protocol):
    """Decides one column."""

    def __call__(self, target: Tensor, error: Tensor, column: int) -> None:
        """target [out]: the column with all feedback. error [out]: the column as it was; it becomes that
        minus what is decided."""


Enter = Callable[[Tensor, int], None]
"""Looks at a block or sub-block [columns, out] before its columns are changed, as it would be if none of them
were: all errors so far made up for. And the number of its first column."""


def walk(
    columns: Tensor,
    factor: Tensor,
    change: ChangeColumn,
    *,
    block_size: int,
    sub_block: int = SUB_BLOCK,
    enter_block: Enter | None = None,
    enter_sub_block: Enter | None = None,
) -> None:
    """Change all `columns` [in, out], the last first; their rows become their errors.

    factor: lower L [in, in]; it is overwritten by the shares L_ij / L_jj.

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
                change(target.addmv_(received, share), error, column)
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
    fraction grows tenfold, up to 1.0, for as long as the factorization fails.

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
        fraction = min(10 * fraction, _MAX_DAMPENING)
