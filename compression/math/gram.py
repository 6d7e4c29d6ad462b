"""The Gram matrix X^T X of a linear's input: the one statistic that calibration needs.

Others call it the Hessian: it is half that of the output error |X W^T - X W'^T|^2 with respect to a row of W.
Its diagonal divided by the token count is E[x^2].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.machine.arithmetic import products_of_bfloat16
from compression.math.finite import all_finite
from compression.math.sizes import CHUNK_TOKENS

_DIVIDED_ROWS = 512
"""Rows of a Gram matrix that are divided at once: products of scales, by which they are, take as much."""


@dataclass(frozen=True)
class Gram:
    """matrix [in, in] float32, exactly symmetric: the sum of x x^T over `tokens` rows x of the input.

    borrowed: how many of them are not the input's own (see `fill_up`).
    """

    matrix: Tensor
    tokens: int
    borrowed: int = 0

    def importance(self) -> Tensor:
        """E[x^2] of every input column, [in] float32."""
        return self.matrix.diagonal() / self.tokens

    def divided(self, scales: Tensor) -> Gram:
        """The Gram matrix of the input divided, column by column, by `scales` [in] float32."""
        matrix = torch.empty_like(self.matrix)
        parts = [torch.split(each, _DIVIDED_ROWS) for each in (self.matrix, scales, matrix)]
        for rows, their_scales, divided in zip(*parts, strict=True):
            torch.div(rows, torch.outer(their_scales, scales), out=divided)
        return replace(self, matrix=matrix)


def accumulate_gram(inputs: Iterable[Tensor]) -> Gram:
    """Sum x x^T over all tokens of `inputs`, each [..., in] in one float dtype.

    Every product is exact and every sum is float32, whatever the inputs are: a Gram matrix that is rounded to
    bfloat16 (1.8e-3) is often not positive definite (docs/adr/0036-grams-in-float32.md).

    Raises:
        ValueError: no tokens at all.
    """
    accumulator = GramAccumulator()
    for tensor in inputs:
        accumulator.add(tensor)
    gram = accumulator.finish()
    if gram is None:
        raise ValueError("a Gram matrix needs at least one token")
    return gram


class GramAccumulator:
    """A Gram matrix on its way: tokens are cut every CHUNK_TOKENS, whatever the shapes they arrive in."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0
        self._pending: list[Tensor] = []
        self._missing = CHUNK_TOKENS

    def add(self, inputs: Tensor) -> None:
        """inputs: [..., in]."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        while tokens.shape[0] >= self._missing:
            self._pending.append(tokens[: self._missing])
            tokens = tokens[self._missing :]
            self._flush()
        if tokens.shape[0]:
            self._pending.append(tokens)
            self._missing -= tokens.shape[0]

    def finish(self) -> Gram | None:
        """The Gram of all that was added, None of nothing; to be called once."""
        if self._pending:
            self._flush()
        if self._total is None:
            return None
        _mirror(self._total)
        return Gram(self._total, self._tokens)

    def _flush(self) -> None:
        chunk = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending, self._missing = [], CHUNK_TOKENS
        if self._total is None:
            self._total = torch.zeros(chunk.shape[1], chunk.shape[1], device=chunk.device)
        _add_upper_panels(self._total, chunk)
        self._tokens += chunk.shape[0]


def fill_up(own: Gram | None, everyone: Gram) -> Gram:
    """The statistics of an expert that sees fewer tokens n than its input has columns d, filled up to d
    with what it would see of all N tokens of its layer:

        G + (d - n) / N * G_all

    A shrinkage of G towards G_all (Ledoit and Wolf, 2004) whose weight, 1 - n / d, is zero from where G can
    have full rank on, and one for an expert that sees nothing. own: None stands for no tokens.
    """
    columns = everyone.matrix.shape[0]
    seen = 0 if own is None else own.tokens
    missing = max(columns - seen, 0)
    matrix = everyone.matrix * (missing / everyone.tokens)
    return Gram(matrix if own is None else matrix.add_(own.matrix), seen + missing, missing)


def require_finite_gram(name: str, gram: Gram) -> None:
    """Refuse the statistics of module `name` if an activation was NaN or Inf, or overflowed when squared.

    Raises:
        NumericalError: `non_finite_activations`.
    """
    if not all_finite(gram.matrix):
        raise NumericalError(
            "non_finite_activations",
            f"The input of {name} holds NaN or Inf, or values too large to square in float32.",
            "Check the source model on the calibration text, and its dtype: float16 overflows at 65504.",
        )


def _add_upper_panels(total: Tensor, chunk: Tensor) -> None:
    """Add chunk^T chunk to `total`, on and above the diagonal only: little more than half of the products.

    ┌────┬────┬────┐
    │ ▓▓ │ ▓▓ │ ▓▓ │  panel 0: columns 0.. of the chunk times all
    └────┼────┼────┤
         │ ▓▓ │ ▓▓ │  panel 1: its columns times those from itself on
         └────┴────┘
    """
    if chunk.is_cuda and chunk.dtype == torch.bfloat16:
        for start, stop in _panels(chunk.shape[1]):
            product = torch.mm(chunk[:, start:stop].t(), chunk[:, start:], out_dtype=torch.float32)
            total[start:stop, start:].add_(product)
        return
    inputs = chunk.float()
    with products_of_bfloat16() if chunk.dtype == torch.bfloat16 else nullcontext():
        for start, stop in _panels(chunk.shape[1]):
            total[start:stop, start:].addmm_(inputs[:, start:stop].t(), inputs[:, start:])


def _mirror(total: Tensor) -> None:
    """Make `total` symmetric from what is on and above its diagonal."""
    for start, stop in _panels(total.shape[0]):
        corner = total[start:stop, start:stop]
        corner.copy_((corner + corner.t()).mul_(0.5))
        total[stop:, start:stop] = total[start:stop, stop:].t()


def _panels(columns: int) -> Iterator[tuple[int, int]]:
    """Eighths of the columns, in multiples of 64 and not narrower than 256, where products are efficient."""
    width = max(256, -(-columns // 8 // 64) * 64)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)
