"""What a run reports: one row per module, the evaluation, and totals. Plain data, JSON both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModuleReport:
    """One compressed linear.

    scheme: None where it was only pruned. sparsity: share of zeros in what a reader gets, None where nothing
    was pruned. relative_error: |X W^T - X W'^T|_F^2 / |X W^T|_F^2 over the calibration tokens; None without
    data, where X W^T is zero and the error is not, and where the error is less than float32 statistics of X
    can tell. weight_error: |W - W'|_F^2 / |W|_F^2. dampening_frac: the one that worked, None when nothing was
    factorized; dampening_asked: the recipe's. smoothed: whether scales of the norm before it were folded into
    it. tokens: how many were routed to it, for an expert's; where they are fewer than its columns,
    relative_error is over those that its Gram was filled up with as well. dequantized_sha256: digest of the
    dequantized weight's bytes as the engine meant it; the self-check compares the written file with it.
    """

    name: str
    method: str
    scheme: str | None
    group_size: int | None
    shape: tuple[int, int]
    weight_error: float
    relative_error: float | None
    dampening_frac: float | None
    dead_columns: int
    dequantized_sha256: str
    sparsity: float | None = None
    smoothed: bool = False
    tokens: int | None = None
    dampening_asked: float | None = None

    @property
    def dampening_raised(self) -> bool:
        """Whether more was taken than the recipe's, which did not make the Gram matrix positive definite."""
        asked, taken = self.dampening_asked, self.dampening_frac
        return asked is not None and taken is not None and taken > asked

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModuleReport:
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class EvaluationReport:
    """Original and compressed model on the same held-out tokens.

    perplexity = exp(mean negative log likelihood, nats per token). kl_divergence: mean over tokens of
    KL(original || compressed) in nats. top1_agreement: fraction of tokens whose most likely next token is the
    same. *_stderr: standard error of the mean over tokens.
    """

    tokens: int
    perplexity_original: float
    perplexity_compressed: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float
    kl_divergence: float
    kl_divergence_stderr: float
    top1_agreement: float
    top1_agreement_stderr: float
    split: str  # "documents", or "blocks" where the held-out text and the calibration's share a document


@dataclass(frozen=True)
class DataReport:
    """What became of the calibration text.

    documents: those that were drawn, without documents_dropped, which have no tokens. tokens_dropped: of what
    was tokenized; a long document is tokenized only as far as it is used.
    """

    documents: int
    samples: int
    tokens_used: int
    tokens_dropped: int
    documents_dropped: int = 0


@dataclass(frozen=True)
class Totals:
    """Bytes of safetensors before and after, parameters, seconds of the whole run."""

    source_bytes: int
    output_bytes: int
    parameters: int
    compressed_parameters: int
    seconds: float


@dataclass
class Report:
    """The result of one compression.

    phases: seconds by phase; compress is split into read, forward, gram, solve, evaluate, write.
    bytes_may_differ: a resumed run that could not obey the first attempt's resolved plan.
    """

    work_key: str
    fingerprint: str
    totals: Totals
    modules: list[ModuleReport]
    evaluation: EvaluationReport | None
    data: DataReport | None
    phases: dict[str, float]
    peak_host_bytes: int
    peak_gpu_bytes: int
    bytes_may_differ: bool = False
    warnings: list[dict[str, str]] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def dampening_warnings(rows: Iterable[ModuleReport]) -> list[dict[str, str]]:
    """What is to be said where a method took more dampening than its step asks for: one warning, or none."""
    raised = [row for row in rows if row.dampening_raised]
    if not raised:
        return []
    most = max(raised, key=lambda row: row.dampening_frac or 0.0)
    names = ", ".join(row.name for row in raised[:5]) + (" ..." if len(raised) > 5 else "")
    message = (
        f"The Gram matrices of {len(raised)} linears are not positive definite with the recipe's "
        f"dampening_frac ({most.dampening_asked:g}). It was doubled until they were, up to "
        f"{most.dampening_frac:g}: {names}. More calibration tokens help, or a larger dampening_frac."
    )
    return [{"code": "dampening_raised", "message": message}]
