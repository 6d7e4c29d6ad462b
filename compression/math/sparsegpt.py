"""SparseGPT: pruning with error feedback (Frantar and Alistarh, 2023, arXiv:2301.00774, algorithm 1).

A weight costs L_jj^2 times its square, its feedback included, whatever is made of the columns before it
(`compression.math.gptq`); L_jj^2 is the paper's 1 / [H^-1]_jj. The cheapest are pruned, and what they
cost is made up for by those that are still to come. Costs are compared by their roots, |w| L_jj: a square of
them may leave float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compression.math.gptq import SUB_BLOCK, dampened_cholesky, walk
from compression.math.prune import MaskStructure, Pruned, keep_in_groups, keep_largest


def sparsegpt(
    weight: Tensor,
    gram_matrix: Tensor,
    *,
    sparsity: float,
    structure: MaskStructure | None,
    splits: Sequence[int],
    block_size: int = 128,
    dampening_frac: float = 0.01,
) -> Pruned:
    """Prune `weight` [out, in] so that |X W^T - X W'^T|_F stays small; gram_matrix [in, in] is X^T X.

    structure (n, m): n of every m consecutive weights of a row are kept; None: the share `sparsity` of each
    block of columns goes, of each linear by itself. splits: rows of the linears that are stacked along out.

    Raises:
        NumericalError: `singular_gram`, `weights_out_of_range`.
    """
    columns = weight.t().float().contiguous()
    columns[gram_matrix.diagonal() == 0] = 0.0
    factor, worked = dampened_cholesky(gram_matrix.float().clone(), dampening_frac)
    masks = _Masks(columns, factor.diagonal().clone(), sparsity, structure, splits)
    original = columns.clone()
    for target, error, column in walk(
        columns,
        factor,
        block_size=block_size,
        sub_block=SUB_BLOCK if structure is None else structure[1],
        enter_block=masks.choose_in_block if structure is None else None,
        enter_sub_block=None if structure is None else masks.choose_in_groups,
    ):
        error.addcmul_(target, masks.keep[column], value=-1)
    pruned = (original - columns).mul_(masks.keep)
    return Pruned(pruned.t().contiguous(), masks.keep.t().contiguous() != 0, worked)


class _Masks:
    """Chooses what a walk prunes. keep: float [in, out], 1 where a weight stays."""

    def __init__(
        self,
        columns: Tensor,
        roots: Tensor,
        sparsity: float,
        structure: MaskStructure | None,
        splits: Sequence[int],
    ) -> None:
        self.keep = torch.empty_like(columns)
        self._roots = roots
        self._sparsity, self._structure, self._splits = sparsity, structure, splits

    def choose_in_block(self, block: Tensor, start: int) -> None:
        scores = self._scores(block, start)
        first = 0
        for rows in self._splits:
            part = slice(first, first + rows)
            self.keep[start : start + len(block), part] = keep_largest(scores[:, part], self._sparsity)
            first += rows

    def choose_in_groups(self, block: Tensor, start: int) -> None:
        assert self._structure is not None
        kept = keep_in_groups(self._scores(block, start).t(), self._structure)
        self.keep[start : start + len(block)] = kept.t()

    def _scores(self, block: Tensor, start: int) -> Tensor:
        return block.abs() * self._roots[start : start + len(block), None]
