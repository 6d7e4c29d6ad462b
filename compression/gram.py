"""The Gram matrix X^T X of a linear's input: the one statistic that calibration needs.

It is half the Hessian of the output error |X W^T - X W'^T|^2 with respect to a row of W, and its diagonal
divided by the token count is E[x^2].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compression.errors import NumericalError

Precision = Literal["mixed", "float32"]

CHUNK_TOKENS = 4096
"""Tokens in one matrix product. Fixed, so that a Gram's bits do not depend on how the inputs were batched."""


@dataclass(frozen=True)
class Gram:
    """matrix [in, in] float32, exactly symmetric: the sum of x x^T over `tokens` rows x of the input."""

    matrix: Tensor
    tokens: int

    def importance(self) -> Tensor:
        """E[x^2] of every input column, [in] float32."""
        return self.matrix.diagonal() / self.tokens


def accumulate_gram(inputs: Iterable[Tensor], *, precision: Precision) -> Gram:
    """Sum x x^T over all tokens of `inputs`, each [..., in] in one float dtype.

    precision "float32": products of float32 copies. "mixed": bfloat16 inputs are multiplied as they are and
    summed over chunks in float32. On CUDA each product accumulates and returns float32, so nothing is lost;
    on the CPU a chunk's product is rounded to bfloat16 (1.8e-3 relative). Other dtypes are always float32.

    Raises:
        ValueError: no tokens at all.
    """
    total: Tensor | None = None
    tokens = 0
    for chunk in _fixed_chunks(inputs):
        product = _product(chunk, precision)
        total = product.float() if total is None else total.add_(product)
        tokens += chunk.shape[0]
    if total is None:
        raise ValueError("a Gram matrix needs at least one token")
    return Gram((total + total.t()).mul_(0.5), tokens)


def require_finite_gram(name: str, gram: Gram) -> None:
    """Refuse the statistics of module `name` if an activation was NaN or Inf, or overflowed when squared.

    Raises:
        NumericalError: `non_finite_activations`.
    """
    if not torch.isfinite(gram.matrix).all():
        raise NumericalError(
            "non_finite_activations",
            f"The input of {name} holds NaN or Inf, or values too large to square in float32.",
            "Check the source model on the calibration text, and its dtype: float16 overflows at 65504.",
        )


def _product(chunk: Tensor, precision: Precision) -> Tensor:
    if precision == "float32" or chunk.dtype != torch.bfloat16:
        chunk = chunk.float()
        return chunk.t() @ chunk
    if chunk.is_cuda:
        return torch.mm(chunk.t(), chunk, out_dtype=torch.float32)
    return chunk.t() @ chunk


def _fixed_chunks(inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The stream of tokens cut every CHUNK_TOKENS, whatever the shapes it arrives in."""
    pending: list[Tensor] = []
    missing = CHUNK_TOKENS
    for tensor in inputs:
        tokens = tensor.reshape(-1, tensor.shape[-1])
        while tokens.shape[0] >= missing:
            pending.append(tokens[:missing])
            tokens = tokens[missing:]
            yield _joined(pending)
            pending, missing = [], CHUNK_TOKENS
        if tokens.shape[0]:
            pending.append(tokens)
            missing -= tokens.shape[0]
    if pending:
        yield _joined(pending)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
