"""The comparison against the same quantities computed in plain float64, all tokens at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compression.errors import NumericalError
from compression.math.comparison import Comparison
from compression.report import EvaluationReport


def logits_pair(
    batch: int, seq: int, vocab: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = 3 * torch.randn(batch, seq, vocab, generator=generator)
    compressed = original + 0.3 * torch.randn(batch, seq, vocab, generator=generator)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    return original, compressed, tokens


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(original: torch.Tensor, compressed: torch.Tensor, tokens: torch.Tensor) -> EvaluationReport:
    p = log_softmax64(original[:, :-1].double().numpy())
    q = log_softmax64(compressed[:, :-1].double().numpy())
    targets = tokens[:, 1:].numpy()[..., None]
    nll_p = -np.take_along_axis(p, targets, -1).ravel()
    nll_q = -np.take_along_axis(q, targets, -1).ravel()
    kl = (np.exp(p) * (p - q)).sum(-1).ravel()
    same = (p.argmax(-1) == q.argmax(-1)).ravel().astype(float)
    n = len(nll_p)
    ratio = np.exp(nll_q.mean()) / np.exp(nll_p.mean())
    return EvaluationReport(
        tokens=n,
        perplexity_original=np.exp(nll_p.mean()),
        perplexity_compressed=np.exp(nll_q.mean()),
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=ratio * (nll_q - nll_p).std() / math.sqrt(n),
        kl_divergence=kl.mean(),
        kl_divergence_stderr=kl.std() / math.sqrt(n),
        top1_agreement=same.mean(),
        top1_agreement_stderr=same.std() / math.sqrt(n),
        split="documents",
    )


def assert_close(got: EvaluationReport, want: EvaluationReport, rel: float) -> None:
    for name, value in vars(want).items():
        if isinstance(value, str | int):
            assert getattr(got, name) == value
        else:
            assert getattr(got, name) == pytest.approx(value, rel=rel), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_float64_formula(dtype: torch.dtype) -> None:
    original, compressed, tokens = logits_pair(3, 40, 500)
    original, compressed = original.to(dtype), compressed.to(dtype)
    comparison = Comparison()
    comparison.add(original, compressed, tokens)
    assert_close(comparison.report("documents"), reference(original, compressed, tokens), 2e-6)


def test_batches_and_chunks_do_not_matter() -> None:
    """A vocabulary of 300,000 makes chunks of 13 rows; two batches of different length."""
    first, second = logits_pair(1, 30, 300_000, seed=1), logits_pair(2, 3, 300_000, seed=2)
    comparison = Comparison()
    comparison.add(*first)
    comparison.add(*second)
    parts = [reference(*first), reference(*second)]
    total = sum(part.tokens for part in parts)
    report = comparison.report("blocks")
    assert report.tokens == total == 29 + 4
    for name in ("kl_divergence", "top1_agreement"):
        mean = sum(getattr(part, name) * part.tokens for part in parts) / total
        assert getattr(report, name) == pytest.approx(mean, rel=1e-4)
    log_ratio = sum(math.log(part.perplexity_ratio) * part.tokens for part in parts) / total
    assert report.perplexity_ratio == pytest.approx(math.exp(log_ratio), rel=1e-6)


def test_a_model_compared_with_itself() -> None:
    original, _, tokens = logits_pair(1, 20, 100)
    comparison = Comparison()
    comparison.add(original, original.clone(), tokens)
    report = comparison.report("documents")
    assert (report.perplexity_ratio, report.perplexity_ratio_stderr) == (1.0, 0.0)
    assert (report.kl_divergence, report.kl_divergence_stderr) == (0.0, 0.0)
    assert (report.top1_agreement, report.top1_agreement_stderr) == (1.0, 0.0)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    logits, tokens = torch.zeros(2, 9, 64), torch.arange(18).reshape(2, 9)
    comparison = Comparison()
    comparison.add(logits, logits, tokens)
    assert comparison.report("documents").perplexity_original == pytest.approx(64)


def test_the_logits_are_left_as_they_were() -> None:
    original, compressed, tokens = logits_pair(1, 10, 50)
    copies = original.clone(), compressed.clone()
    Comparison().add(original, compressed, tokens)
    assert torch.equal(original, copies[0])
    assert torch.equal(compressed, copies[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_logits_are_an_error(bad: float, which: int) -> None:
    pair = logits_pair(1, 10, 50)
    pair[which][0, 3, 7] = bad
    with pytest.raises(NumericalError, match=("original", "compressed")[which]) as caught:
        Comparison().add(*pair)
    assert caught.value.code == "non_finite_logits"
