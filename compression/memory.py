"""How much memory a run takes at its peak, item by item, from header shapes.

The engine never holds the whole model (streaming): what counts is what lies outside the layers, a layer or
two, the work space of one group of linears, and what the suspended forwards hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from compression.recipe import Calibration, Evaluation

PROCESS_BYTES = 450 << 20
"""Resident memory of a process that has imported torch and transformers, before any model."""
CUDA_CONTEXT_BYTES = 600 << 20
"""What a CUDA context and the libraries' work spaces take on the device."""
COMPUTE_ITEMSIZE = 4
"""Bytes of a number in the forward pass: a CPU without native 16-bit products computes in float32, and at
submission nobody knows which worker will come."""
ACTIVATION_BUDGET_BYTES = 4 << 30
"""What suspended forwards may hold together, unless a caller allows more."""
BATCH_TOKENS = 4096
"""Tokens that run through the model together while calibrating."""
CHUNK_TOKENS = 4096
"""Tokens in one matrix product of a Gram. Fixed, so that its bits do not depend on how they were batched."""
EVALUATION_CHUNK_BYTES = 64 << 20
"""Work space of the comparison of two streams of logits: four float32 chunks of 16 MiB."""

Phase = Literal["solve", "forward", "compare"]


@dataclass(frozen=True)
class MemoryItem:
    """One part of the peak, and how it was found.

    phases: when it is held; the peak is that of the phase that holds most. on_device: it lies on the GPU
    where one is used.
    """

    name: str
    bytes: int
    basis: str
    phases: tuple[Phase, ...] = ("solve", "forward", "compare")
    on_device: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """The items of a run's peak. Host bytes are those of a run on the CPU, which holds every item."""

    items: tuple[MemoryItem, ...]

    @property
    def host_bytes(self) -> int:
        return _largest_phase(self.items)

    @property
    def gpu_bytes(self) -> int:
        return CUDA_CONTEXT_BYTES + _largest_phase([item for item in self.items if item.on_device])

    def to_dict(self) -> dict[str, Any]:
        items = [
            {"name": item.name, "bytes": item.bytes, "basis": item.basis, "phases": list(item.phases)}
            for item in self.items
        ]
        return {"host_bytes": self.host_bytes, "gpu_bytes": self.gpu_bytes, "items": items}


def _largest_phase(items: Sequence[MemoryItem]) -> int:
    return max(sum(item.bytes for item in items if phase in item.phases) for phase in get_args(Phase))


@dataclass(frozen=True)
class ParkedTokens:
    """Tokens whose forwards are suspended at the same time.

    The evaluation's count twice: they flow through the original and through the compressed layers, one
    block of `block` tokens at a time.
    """

    calibration: int
    evaluation: int
    block: int

    @classmethod
    def of(cls, calibration: Calibration, evaluation: Evaluation, *, calibrates: bool) -> ParkedTokens:
        length = calibration.max_seq_length
        samples = calibration.num_calibration_samples if calibrates else 0
        return cls(samples * length, evaluation.samples(calibration) * length, length)

    @property
    def total(self) -> int:
        return self.calibration + 2 * self.evaluation


@dataclass(frozen=True)
class Workload:
    """The sizes that decide the peak.

    itemsize: bytes of a number in the compute dtype. layer_bytes: the largest layer in its source dtype;
    layer_output_bytes: the same, compressed. group_elements: numbers in the largest stacked group of linears
    (rows x columns); group_columns: the most input columns of a group. parked_width: numbers a token that a
    suspended forward holds. parked: None without a dataset. spills: whether what is parked lies on disk.
    solves_gram: whether a Gram matrix is factorized. expert_columns: the most input columns of an expert's
    linear, 0 without experts; experts_at_once: of how many experts Gram matrices are held together.
    """

    itemsize: int
    outside_bytes: int
    layer_bytes: int
    layer_output_bytes: int
    group_elements: int
    group_columns: int
    parked_width: int
    intermediate_size: int
    vocab_size: int
    parked: ParkedTokens | None
    spills: bool
    solves_gram: bool
    expert_columns: int = 0
    experts_at_once: int = 0


def activation_bytes(parked_width: int, itemsize: int, tokens: ParkedTokens) -> int:
    """Bytes that all suspended forwards hold together."""
    return parked_width * itemsize * tokens.total


def expert_gram_bytes(columns: int, tokens: ParkedTokens) -> int:
    """Bytes that the statistics of one expert take while a sweep makes them: its Gram, another to fill it up
    with, and the tokens that wait for the next product."""
    waiting = min(CHUNK_TOKENS, max(tokens.calibration, tokens.evaluation))
    return 4 * (2 * columns**2 + waiting * columns)


def experts_at_once(budget_bytes: int, columns: int, tokens: ParkedTokens, experts: int) -> int:
    """How many experts a sweep serves within the budget, one at least."""
    return max(1, min(experts, budget_bytes // expert_gram_bytes(columns, tokens)))


def estimate(work: Workload) -> MemoryEstimate:
    """The itemized peak of one run."""
    compares = work.parked is not None and work.parked.evaluation > 0
    copies = 2 if compares else 1
    items = [
        MemoryItem("process", PROCESS_BYTES, "interpreter, torch, transformers: measured", on_device=False),
        MemoryItem("outside the layers", work.outside_bytes, "embeddings, final norm, lm_head as on disk"),
        MemoryItem(
            "layer",
            copies * work.layer_bytes,
            f"{copies} x the largest layer" + (", original and compressed" if compares else ""),
            ("solve", "forward"),
        ),
        MemoryItem(
            "compressed layer",
            work.layer_output_bytes,
            "the largest layer as it is written",
            ("solve", "forward"),
        ),
        MemoryItem(
            "solver",
            4 * 4 * work.group_elements,
            "4 float32 copies of the largest stacked group",
            ("solve",),
        ),
    ]
    if work.solves_gram:
        items.append(
            MemoryItem(
                "Gram matrix",
                3 * 4 * work.group_columns**2,
                "3 float32 matrices: Gram, factor, work",
                ("solve",),
            )
        )
    if work.parked is not None and work.experts_at_once:
        items.append(
            MemoryItem(
                "experts' Gram matrices",
                work.experts_at_once * expert_gram_bytes(work.expert_columns, work.parked)
                + 4 * work.expert_columns**2,
                f"of {work.experts_at_once} at once, and of the tokens of all",
                ("solve",),
            )
        )
    if work.parked is not None:
        items += _activations(work, work.parked)
    return MemoryEstimate(tuple(items))


def _activations(work: Workload, parked: ParkedTokens) -> list[MemoryItem]:
    """What the suspended forwards hold, and the batch that runs."""
    number = work.itemsize * work.parked_width
    items = []
    if work.spills:
        return [
            MemoryItem(
                "running batch",
                min(parked.total, BATCH_TOKENS) * (number + 3 * work.intermediate_size * work.itemsize),
                f"at most {BATCH_TOKENS} tokens; the others' hidden states are on disk",
            ),
            *([_logits(work, parked)] if parked.evaluation else []),
        ]
    if parked.calibration:
        batch = min(parked.calibration, BATCH_TOKENS)
        items += [
            MemoryItem(
                "parked calibration",
                parked.calibration * number,
                f"{parked.calibration} tokens x {work.parked_width} numbers",
                ("solve", "forward"),
            ),
            MemoryItem(
                "running batch",
                3 * batch * work.intermediate_size * work.itemsize,
                f"{batch} tokens x 3 intermediates",
                ("forward",),
            ),
        ]
    if parked.evaluation:
        items += [
            MemoryItem(
                "parked evaluation",
                2 * parked.evaluation * number,
                f"2 streams x {parked.evaluation} tokens x {work.parked_width} numbers",
            ),
            _logits(work, parked),
        ]
    return items


def _logits(work: Workload, parked: ParkedTokens) -> MemoryItem:
    return MemoryItem(
        "logits",
        2 * parked.block * work.vocab_size * work.itemsize + EVALUATION_CHUNK_BYTES,
        f"2 streams x {parked.block} tokens x vocabulary, and 4 float32 chunks",
        ("compare",),
    )
