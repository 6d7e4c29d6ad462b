"""How much memory a run takes at its peak, item by item, from header shapes.

The engine never holds the whole model (streaming): what counts is what lies outside the layers, a layer or
two, the work space of one group of linears, and what the suspended forwards hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compression.recipe import Calibration, Evaluation

PROCESS_BYTES = 450 << 20
"""Resident memory of a process that has imported torch and transformers, before any model."""
CUDA_CONTEXT_BYTES = 600 << 20
"""What a CUDA context and the libraries' work spaces take on the device."""
BATCH_TOKENS = 4096
"""Tokens that run through the model together."""
EVALUATION_CHUNK_BYTES = 256 << 20
"""Work space of the comparison of two streams of logits."""


@dataclass(frozen=True)
class MemoryItem:
    """One part of the peak, and how it was found. on_device: it lies on the GPU where one is used."""

    name: str
    bytes: int
    basis: str
    on_device: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """The items of a run's peak. Host bytes are those of a run on the CPU, which holds every item."""

    items: tuple[MemoryItem, ...]

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def gpu_bytes(self) -> int:
        return CUDA_CONTEXT_BYTES + sum(item.bytes for item in self.items if item.on_device)

    def to_dict(self) -> dict[str, Any]:
        items = [{"name": item.name, "bytes": item.bytes, "basis": item.basis} for item in self.items]
        return {"host_bytes": self.host_bytes, "gpu_bytes": self.gpu_bytes, "items": items}


@dataclass(frozen=True)
class ParkedTokens:
    """Tokens whose forwards are suspended at the same time.

    The evaluation blocks count twice: they flow through the original and through the compressed layers.
    """

    calibration: int
    evaluation: int

    @classmethod
    def of(cls, calibration: Calibration, evaluation: Evaluation, *, calibrates: bool) -> ParkedTokens:
        length = calibration.max_seq_length
        samples = calibration.num_calibration_samples if calibrates else 0
        return cls(samples * length, evaluation.samples(calibration) * length)

    @property
    def total(self) -> int:
        return self.calibration + 2 * self.evaluation


@dataclass(frozen=True)
class Workload:
    """The sizes that decide the peak.

    itemsize: bytes of a number in the compute dtype. layer_bytes: the largest layer in its source dtype;
    layer_output_bytes: the same, compressed. group_elements: numbers in the largest stacked group of linears
    (rows x columns); group_columns: the most input columns of a group. parked_width: numbers a token that a
    suspended forward holds. parked: None without a dataset. solves_gram: whether a Gram matrix is factorized.
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
    solves_gram: bool


def activation_bytes(parked_width: int, itemsize: int, tokens: ParkedTokens) -> int:
    """Bytes that all suspended forwards hold together."""
    return parked_width * itemsize * tokens.total


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
        ),
        MemoryItem("compressed layer", work.layer_output_bytes, "the largest layer as it is written"),
        MemoryItem("solver", 4 * 4 * work.group_elements, "4 float32 copies of the largest stacked group"),
    ]
    if work.solves_gram:
        matrices = 3 * 4 * work.group_columns**2
        items.append(MemoryItem("Gram matrix", matrices, "3 float32 matrices: Gram, factor, work"))
    if work.parked is not None:
        tokens = min(work.parked.total, BATCH_TOKENS)
        batch = tokens * 3 * work.intermediate_size * work.itemsize
        items += [
            MemoryItem(
                "parked activations",
                activation_bytes(work.parked_width, work.itemsize, work.parked),
                f"{work.parked.total} tokens x {work.parked_width} numbers",
            ),
            MemoryItem("running batch", batch, f"{tokens} tokens x 3 intermediates"),
        ]
    if work.parked is not None and compares:
        tokens = min(work.parked.evaluation, BATCH_TOKENS)
        logits = 2 * tokens * work.vocab_size * work.itemsize
        items.append(
            MemoryItem(
                "evaluation logits",
                logits + EVALUATION_CHUNK_BYTES,
                f"2 streams x {tokens} tokens x vocabulary, and a float32 chunk",
            )
        )
    return MemoryEstimate(tuple(items))
