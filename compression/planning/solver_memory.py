"""The work space in which one group of linears is solved, in bytes: a part of the estimate in memory.py."""

from __future__ import annotations

from dataclasses import dataclass

from compression.math.sizes import COMPARED_ROWS
from compression.methods import METHODS

FLOAT32 = 4
"""Bytes of a number in which weights are solved and statistics kept."""
_PACKING_BYTES, _FP4_PACKING_BYTES = 6, 24
"""A number of a linear that is packed and read back: copies that the compressed-tensors library makes."""
_COMPARED_BYTES = 16
"""A number of COMPARED_ROWS rows, compared with what they became: both, and both times the Gram."""


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
    methods = [METHODS[name] for name in group.methods]
    working = max([0, *(m.work_bytes(numbers, gram) for m in methods if m.kind == "quantizes")])
    for method in methods:
        if method.kind == "prunes":  # what is left of the weight is held beside what quantizes it
            working = max(working + numbers * FLOAT32, method.work_bytes(numbers, gram))
    comparing = min(group.largest_rows, COMPARED_ROWS) * group.columns * _COMPARED_BYTES
    copying = largest * (_FP4_PACKING_BYTES if group.fp4 else _PACKING_BYTES)
    replaced = group.rows * group.columns * itemsize
    packing = numbers + replaced + max(comparing, copying)
    basis = f"{numbers} numbers of {group.name} and those beside it, by {'+'.join(group.methods)}"
    return stacked + max(working, packing), basis
