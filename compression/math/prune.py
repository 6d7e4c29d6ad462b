"""Pruning by a score of each weight, of which the highest stay, or n of every m: magnitude and Wanda."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MaskStructure = tuple[int, int]
"""(n, m): n of every m consecutive weights of a row stay."""


class Pruned(NamedTuple):
    """What a method that prunes gives back.

    weight: pruned, [out, in] float32. keep: bool [out, in], where it was kept, None for everywhere.
    dampening_frac: as in `grid.Rounded`.
    """

    weight: Tensor
    keep: Tensor | None
    dampening_frac: float | None = None


def magnitude(
    weight: Tensor,
    _gram: Tensor | None,
    *,
    sparsity: float,
    structure: MaskStructure | None,
    splits: Sequence[int],
) -> Pruned:
    """Prune the smallest weights of `weight` [out, in]; splits: rows of the linears stacked along out."""
    keep = magnitude_keep(weight, sparsity, structure, splits)
    return Pruned(weight * keep, keep)


def wanda(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float,
    structure: MaskStructure | None,
    splits: Sequence[int],  # noqa: ARG001  # rows are compared within themselves
) -> Pruned:
    """Prune what is small in weight times input; gram: [in, in], of
    the input, whose diagonal holds |X_j|^2."""
    keep = wanda_keep(weight, gram.diagonal(), sparsity, structure)
    return Pruned(weight * keep, keep)


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
    """Wanda: |W_ij| |X_j|_2, compared within a row (Sun et al., 2023, arXiv:2306.11695, section 3).

    weight: [out, in]. importance: |X_j|^2, or E[x_j^2]: a common factor changes nothing. [in].
    """
    scores = weight.abs() * importance.sqrt()
    return keep_by_row(scores, sparsity) if structure is None else keep_in_groups(scores, structure)
