"""The work space in which one group of linears is solved, in bytes: a part of the estimate in memory.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compression.memory import GroupWork

FLOAT32 = 4
"""Bytes of a number in which weights are solved and statistics kept."""
_PACKING_BYTES = 24
"""A number of a linear that is packed and reported on: what it means, its difference from the weight, and in
the compressed-tensors library float32 and int32 copies."""
_PRUNING_BYTES = {"sparsegpt": 25, "wanda": 28, "magnitude": 28}
"""A number of a group while masks are made: columns, their originals, masks and results; sorted scores."""


def solver_bytes(group: GroupWork, itemsize: int, *, has_gram: bool) -> tuple[int, str]:
    """The work space of one group, its Gram matrix apart: bytes, and how they were found.

    All its weights are there in float32, for which float32 ones need no copy, once more stacked where they
    are several; then the method's own copies; later codes, the weights that were replaced, and one linear
    after the other being packed.
    """
    numbers, largest = group.rows * group.columns, group.largest_rows * group.columns
    gram = FLOAT32 * group.columns**2 if has_gram else 0
    copies = (itemsize != FLOAT32) + (largest < numbers)
    stacked = numbers * FLOAT32 * copies
    working = numbers * 5  # scaled, and codes
    if "gptq" in group.methods:
        working = max(
            numbers * 8, numbers * 4 + 2 * gram
        )  # columns twice; then a Gram to factorize, a factor
    for method in group.methods:
        if pruning := _PRUNING_BYTES.get(method):
            factors = 2 * gram if method == "sparsegpt" else 0
            working = max(working + numbers * 4, numbers * pruning, numbers * 4 + factors)
    packing = numbers * (1 + itemsize) + largest * _PACKING_BYTES
    basis = f"{numbers} numbers of {group.name} and those beside it, by {'+'.join(group.methods)}"
    return stacked + max(working, packing), basis
