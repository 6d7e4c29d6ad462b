"""The original and the compressed model on the same tokens: perplexity, KL divergence, top-1 agreement.

Both models predict each token of a block from those before it, so n tokens give n - 1 measurements.
They are paired: the standard error of the perplexity ratio comes from the differences token by token, and is
far smaller than that of either perplexity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compression.errors import NumericalError
from compression.report import EvaluationReport

_CHUNK_BYTES = 16 << 20
"""Size of one float32 copy of logits; about four of them live at the same time."""


class Comparison:
    """Takes the logits of both models batch by batch; keeps four float64 numbers a token."""

    def __init__(self) -> None:
        self._measured: list[Tensor] = []

    def add(self, original: Tensor, compressed: Tensor, tokens: Tensor) -> None:
        """Measures one batch.

        original, compressed: logits [batch, seq, vocab], any float dtype; position i predicts token i + 1.
        tokens: int64 [batch, seq], without padding. The arithmetic is float32, on the device of the logits.
        Raises NumericalError non_finite_logits.
        """
        vocab = original.shape[-1]
        rows = max(1, _CHUNK_BYTES // (4 * vocab))
        for batch in range(tokens.shape[0]):
            targets = tokens[batch, 1:].to(original.device)
            for begin in range(0, len(targets), rows):
                chunk = slice(begin, min(begin + rows, len(targets)))
                measured = _measure(original[batch, chunk], compressed[batch, chunk], targets[chunk])
                self._measured.append(measured.cpu())

    def report(self, split: str) -> EvaluationReport:
        """The means over all measured tokens, and their standard errors: population deviation / sqrt(tokens).

        The error of the ratio r = exp(mean d), d = difference of a token's two negative log likelihoods, is
        r * stderr(d): the delta method.
        """
        original, compressed, divergence, agreement = torch.cat(self._measured, dim=1)
        ratio = math.exp(_mean(compressed - original))
        return EvaluationReport(
            tokens=len(original),
            perplexity_original=math.exp(_mean(original)),
            perplexity_compressed=math.exp(_mean(compressed)),
            perplexity_ratio=ratio,
            perplexity_ratio_stderr=ratio * _stderr(compressed - original),
            kl_divergence=_mean(divergence),
            kl_divergence_stderr=_stderr(divergence),
            top1_agreement=_mean(agreement),
            top1_agreement_stderr=_stderr(agreement),
            split=split,
        )


def _measure(original: Tensor, compressed: Tensor, targets: Tensor) -> Tensor:
    """Logits [rows, vocab] twice and targets [rows] to float64 [4, rows].

    The rows: negative log likelihood (nats) of the target under the original, under the compressed model,
    KL(original || compressed), and 1 where both find the same token most likely.
    """
    agreement = original.argmax(-1) == compressed.argmax(-1)
    log_p = torch.log_softmax(original, -1, dtype=torch.float32)
    log_q = torch.log_softmax(compressed, -1, dtype=torch.float32)
    index = targets.unsqueeze(-1)
    nll_p, nll_q = -log_p.gather(-1, index).squeeze(-1), -log_q.gather(-1, index).squeeze(-1)
    difference = log_q.neg_().add_(log_p)
    divergence = difference.mul_(log_p.exp_()).sum(-1)
    measured = torch.stack([value.double() for value in (nll_p, nll_q, divergence, agreement)])
    for row, model in ((0, "original"), (1, "compressed")):
        if not measured[row].isfinite().all():
            raise NumericalError(
                "non_finite_logits",
                f"The {model} model's logits hold NaN or Inf.",
                "Check the source model on this text, and its dtype: float16 overflows at 65504.",
            )
    return measured


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _stderr(values: Tensor) -> float:
    return float(values.std(correction=0)) / math.sqrt(len(values))
