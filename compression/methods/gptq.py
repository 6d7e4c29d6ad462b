"""GPTQ: second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

Columns are rounded one after the other, each after the errors of those before it have been fed back; how, and
why there is no inverse, is said in `compression.methods.feedback`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compression.methods.feedback import dampened_cholesky, walk
from compression.params import QuantizationParams
from compression.quantizer import QuantizedWeight, code_dtype, round_to_grid
from compression.schemes import QuantizationArgs


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
    keep: Tensor | None = None,
) -> GPTQResult:
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
    kept = None if keep is None else keep.t().index_select(0, order).float()
    factor, worked = dampened_cholesky(gram.index_select(0, order).index_select(1, order), dampening_frac)
    rounding = _Rounding(params, args, order.tolist(), columns, kept)
    walk(columns, factor, rounding, block_size=block_size)
    codes = torch.empty_like(rounding.codes)
    codes[order] = rounding.codes
    return GPTQResult(QuantizedWeight(codes.t().contiguous(), params, args), worked, int(dead.sum()))


class _Rounding:
    """Rounds the columns of a walk. codes: [in, out]; row i is order[i] on disk."""

    def __init__(
        self,
        params: QuantizationParams,
        args: QuantizationArgs,
        order: list[int],
        columns: Tensor,
        kept: Tensor | None,
    ) -> None:
        self.codes = torch.empty(columns.shape, dtype=code_dtype(args), device=columns.device)
        self._args = args
        self._groups = [column // (args.columns or len(order)) for column in order]
        by_row = params.by_row(args, columns.shape[1])
        self._scales = by_row.scale.t().contiguous().unbind()
        zero_point = by_row.zero_point
        self._zero_points = None if zero_point is None else zero_point.t().float().contiguous().unbind()
        self._kept = None if kept is None else kept.unbind()
        self._stored = self.codes.unbind()
        self._code = columns.new_empty(columns.shape[1])

    def __call__(self, target: Tensor, error: Tensor, column: int) -> None:
        code, group = self._code, self._groups[column]
        torch.div(target, self._scales[group], out=code)
        shift = None if self._zero_points is None else self._zero_points[group]
        if shift is None:
            round_to_grid(code, self._args, out=code)
        else:
            round_to_grid(code.add_(shift), self._args, out=code).sub_(shift)
        if self._kept is not None:
            code.mul_(self._kept[column])
        self._stored[column].copy_(code if shift is None else code + shift)
        error.addcmul_(code, self._scales[group], value=-1)
