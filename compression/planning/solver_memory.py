"""The work space in which one group of linears is solved, in bytes: a part of the estimate in memory.py."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4
"""Bytes of a number in which weights are solved and statistics kept."""
_PACKING_BYTES, _FP4_PACKING_BYTES = 6, 24
"""A number of a linear that is packed and read back: copies that the compressed-tensors library makes."""
_COMPARED_BYTES, _COMPARED_ROWS = 16, 512
"""A number of so many rows, while they are compared with what they became: both, and both times the Gram."""
_PRUNING_BYTES = {"sparsegpt": 25, "wanda": 28, "magnitude": 28}
"""A number of a group while masks are made: columns, their originals, masks and results; sorted scores."""


@dataclass(frozen=True)
class GroupWork:
    """Linears of one layer that are solved together.

    name: of the first of them, in its layer. rows: of all; stacked_rows: of those that are solved at once;
    largest_rows: of the largest; columns: of their input. width: numbers a token that a forward holds which
    is suspended before them. methods: types of the steps. folded: numbers of these and later linears whose
    weights a fold holds in float32. expert: of an expert.
    fp4: whether codes are fp4.
    """

    name: str
    rows: int
    stacked_rows: int
    largest_rows: int
    columns: int
    width: int
    methods: tuple[str, ...]
    folded: int = 0
    expert: bool = False
    fp4: bool = False


def solver_bytes(group: GroupWork, itemsize: int, *, has_gram: bool) -> tuple[int, str]:
    """The work space of one group, its Gram matrix apart: bytes, and how they were found.

    What is solved at once is there stacked in float32, for which a float32 weight alone needs no copy; then
    the method's own copies; later codes, the weights that were replaced, and one linear after the other being
    packed.
    """
    numbers, largest = group.stacked_rows * group.columns, group.largest_rows * group.columns
    gram = FLOAT32 * group.columns**2 if has_gram else 0
    stacked = numbers * FLOAT32 * (itemsize != FLOAT32 or largest < numbers)
    working = numbers * 5  # scaled, and codes
    if "gptq" in group.methods:  # columns twice; then a Gram that is factorized, and its factor twice
        working = max(numbers * 8, numbers * 4 + 3 * gram)
    for method in group.methods:
        if pruning := _PRUNING_BYTES.get(method):
            factors = 3 * gram if method == "sparsegpt" else 0
            working = max(working + numbers * 4, numbers * pruning, numbers * 4 + factors)
    comparing = min(group.largest_rows, _COMPARED_ROWS) * group.columns * _COMPARED_BYTES
    copying = largest * (_FP4_PACKING_BYTES if group.fp4 else _PACKING_BYTES)
    replaced = group.rows * group.columns * itemsize
    packing = numbers + replaced + max(comparing, copying)
    basis = f"{numbers} numbers of {group.name} and those beside it, by {'+'.join(group.methods)}"
    return stacked + max(working, packing), basis
