"""Which weights stay: by a score, the highest of all or n of every m."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MaskStructure = tuple[int, int]
"""(n, m): n of every m consecutive weights of a row stay."""


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Bool like `scores`, of any shape: False for the share `sparsity` with the lowest scores."""
    pruned = round(sparsity * scores.numel())
    order = scores.flatten().argsort(stable=True)
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:pruned]] = False
    return keep.view(scores.shape)


def keep_in_groups(scores: Tensor, structure: MaskStructure) -> Tensor:
    """Bool [rows, columns]: True for the n highest of every m consecutive scores of a row."""
    n, m = structure
    groups = scores.reshape(scores.shape[0], -1, m)
    ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (ranks < n).view(scores.shape)


def keep_by_row(scores: Tensor, sparsity: float) -> Tensor:
    """Bool [rows, columns]: in every row, False for the share `sparsity` with the lowest scores."""
    ranks = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks >= round(sparsity * scores.shape[1])


def magnitude_keep(
    weight: Tensor, sparsity: float, structure: MaskStructure | None, splits: Sequence[int]
) -> Tensor:
    """Magnitude pruning: bool [out, in] of `weight`, the linears stacked along out judged one by one."""
    scores = weight.abs()
    if structure is not None:
        return keep_in_groups(scores, structure)
    return torch.cat([keep_largest(part, sparsity) for part in torch.split(scores, list(splits))])


def wanda_keep(
    weight: Tensor, importance: Tensor, sparsity: float, structure: MaskStructure | None
) -> Tensor:
    """Wanda: |W_ij| |X_j|, compared within a row (Sun et al., 2023, arXiv:2306.11695, section 3).

    weight: [out, in]. importance: E[x_j^2], [in].
    """
    scores = weight.abs() * importance.sqrt()
    return keep_by_row(scores, sparsity) if structure is None else keep_in_groups(scores, structure)
