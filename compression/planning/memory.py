"""How much memory a run takes at its peak, item by item, from header shapes.

The engine never holds the whole model (streaming): what counts is what lies outside the layers, a layer, the
work space of one group of linears, and what the suspended forwards hold. Which of these meet is said by
phases; the peak is that of the fullest one, for the group of linears that takes most. docs/memory.md shows
these figures beside measured ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from compression.machine.batching import BATCH_TOKENS
from compression.machine.host_memory import FREED_BYTES
from compression.math.sizes import CHUNK_TOKENS
from compression.planning.solver_memory import FLOAT32, GroupWork, solver_bytes
from compression.recipe import Calibration, Evaluation

PROCESS_BYTES = 407 << 20
"""Peak resident memory of a whole run on a tiny model. Measured with torch 2.13, transformers 5.23."""
LINEAR_BYTES = 6 << 10
"""Python objects of one linear: modules, empty parameters, hooks, lines in plan and report. An assumption."""
CUDA_CONTEXT_BYTES = 600 << 20
"""What a CUDA context and the libraries' work spaces take on the device."""
LARGEST_ITEMSIZE = 4
"""Bytes of a number in the forward pass where it is computed in float32, as a CPU without native 16-bit
products does. At submission nobody knows which worker will come, so plans show this one."""
ACTIVATION_BUDGET_BYTES = 4 << 30
"""What suspended forwards may hold together, unless a caller allows more."""
LOGITS_IN_A_BATCH = 1 << 24
"""Held-out text runs in smaller batches: of both streams, one batch's logits are in memory at once."""
COMPARISON_BYTES = 64 << 20
"""Work space of the comparison of two streams of logits: four float32 chunks of 16 MiB."""
GENERATION_CACHE_BYTES = 1 << 30
"""Keys and values of documents that the model writes side by side."""
GENERATION_WEIGHTS_BYTES = 1 << 30
"""Layers that stay in memory while the model writes; where they are more, each is read when it runs."""

Phase = Literal["generate", "embed", "forward", "gram", "solve", "head", "compare"]
"""generate: the model writes its own calibration text. embed: tokens become hidden states. forward: a batch
runs through a layer. gram: statistics of a group are taken. solve: the group is solved, packed and put back.
head: lm_head is loaded. compare: logits are."""
IN_LAYERS: tuple[Phase, ...] = ("forward", "gram", "solve")


@dataclass(frozen=True)
class MemoryItem:
    """One part of the peak, and how it was found.

    phases: when it is held; the peak is that of the phase that holds most. on_device: it lies on the GPU
    where one is used.
    """

    name: str
    bytes: int
    basis: str
    phases: tuple[Phase, ...] = get_args(Phase)
    on_device: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """The items of a run's peak, with forward passes in numbers of `itemsize` bytes.

    Host bytes are those of a run on the CPU, which holds every item.
    """

    items: tuple[MemoryItem, ...]
    itemsize: int

    @property
    def host_bytes(self) -> int:
        return _largest_phase(self.items)

    @property
    def gpu_bytes(self) -> int:
        return CUDA_CONTEXT_BYTES + _largest_phase([item for item in self.items if item.on_device])

    def to_dict(self) -> dict[str, Any]:
        return {
            "basis": "exact",
            "compute_itemsize": self.itemsize,
            "host_bytes": self.host_bytes,
            "gpu_bytes": self.gpu_bytes,
            "items": [
                {"name": item.name, "bytes": item.bytes, "basis": item.basis, "phases": list(item.phases)}
                for item in self.items
            ],
        }


def _largest_phase(items: Sequence[MemoryItem]) -> int:
    return max(sum(item.bytes for item in items if phase in item.phases) for phase in get_args(Phase))


@dataclass(frozen=True)
class ParkedTokens:
    """Tokens whose forwards are suspended at the same time, in blocks of `block`.

    The evaluation's count twice: they flow through the original and through the compressed layers.
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

    @property
    def at_groups(self) -> int:
        """Tokens of the batches that stop before each group of a layer, where statistics are taken."""
        return self.calibration or self.evaluation

    @property
    def between_layers(self) -> int:
        """Tokens of the batches that stop between layers only."""
        return self.total - self.at_groups

    def batches(self, vocab_size: int) -> list[tuple[int, int]]:
        """(number of batches, tokens in one) of the calibration, then of the evaluation's two streams."""
        streams = ((1, self.calibration, BATCH_TOKENS), (2, self.evaluation, LOGITS_IN_A_BATCH // vocab_size))
        found = []
        for count, tokens, most in streams:
            one = min(tokens, max(1, most // self.block) * self.block)
            found.append((count * -(-tokens // one) if one else 0, one))
        return found


@dataclass(frozen=True)
class Workload:
    """The sizes that decide the peak, in numbers rather than bytes where the compute dtype decides.

    matrix_numbers, matrix_bytes: of the larger of embeddings and lm_head, which are there together only while
    the model writes text (`generates`), and as stored. layers_numbers: of all layers, layer_numbers: of the
    largest; layer_output_bytes: the same, compressed. groups: how many there are of each kind. linears: of
    the whole model. rotary_width: numbers a position in the tables of a rotary embedding. window: of sliding
    attention, 0 without. eager: whether attention scores are kept whole. parked: None where no token runs.
    budget_bytes: what suspended forwards may hold. expert_columns: the most input columns of an expert's
    linear, 0 without experts; experts: in a layer, active_experts: of a token there.
    """

    matrix_numbers: int
    matrix_bytes: int
    layers_numbers: int
    layer_numbers: int
    layer_output_bytes: int
    groups: Mapping[GroupWork, int]
    linears: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    rotary_width: int
    window: int
    eager: bool
    parked: ParkedTokens | None
    budget_bytes: int
    expert_columns: int = 0
    experts: int = 0
    active_experts: int = 0
    generates: bool = False

    @property
    def held_bytes(self) -> int:
        """What all suspended forwards hold together, in memory; in float32, which is the most."""
        if self.parked is None:
            return 0
        widest = max(group.width for group in self.groups)
        return _suspended_bytes(self, self.parked, widest, LARGEST_ITEMSIZE)

    @property
    def spill_bytes(self) -> int:
        """Hidden states on disk, where that would exceed the budget; 0 where they stay in memory."""
        if self.parked is None or self.held_bytes <= self.budget_bytes:
            return 0
        return self.parked.total * self.hidden_size * LARGEST_ITEMSIZE

    @property
    def experts_at_once(self) -> int:
        """How many experts have a Gram matrix in memory at the same time; 0 without experts or data.

        When activations are on disk, each sweep over them is expensive, and their budget is free: the Gram
        matrices get it. When activations are in memory, a sweep costs little, and one expert is enough.
        """
        if self.parked is None or not self.experts:
            return 0
        budget = self.budget_bytes if self.spill_bytes else 0
        return experts_at_once(budget, self.expert_columns, self.parked, self.experts)


def expert_gram_bytes(columns: int, tokens: ParkedTokens) -> int:
    """Bytes that the statistics of one expert take while a sweep makes them: its Gram, another to fill it up
    with, and the tokens that wait for the next product."""
    waiting = min(CHUNK_TOKENS, max(tokens.calibration, tokens.evaluation))
    return FLOAT32 * (2 * columns**2 + waiting * columns)


def experts_at_once(budget_bytes: int, columns: int, tokens: ParkedTokens, experts: int) -> int:
    """How many experts a sweep serves within the budget, one at least."""
    return max(1, min(experts, budget_bytes // expert_gram_bytes(columns, tokens)))


def estimate(work: Workload, itemsize: int = LARGEST_ITEMSIZE) -> MemoryEstimate:
    """The itemized peak of one run whose forward passes compute in numbers of `itemsize` bytes."""
    around = [
        MemoryItem(
            "process",
            PROCESS_BYTES + FREED_BYTES + work.linears * LINEAR_BYTES,
            f"interpreter, torch, transformers, {work.linears} linears without storage, what was freed",
            on_device=False,
        ),
        MemoryItem(
            "layer",
            work.layer_numbers * itemsize,
            f"the largest, {work.layer_numbers} numbers of {itemsize} bytes",
            IN_LAYERS,
        ),
        MemoryItem("compressed layer", work.layer_output_bytes, "the largest as it is written", IN_LAYERS),
    ]
    if work.generates:
        around += _generated(work, itemsize)
    if work.parked is not None:
        around += _embedded(work, work.parked, itemsize)
        if work.parked.evaluation:
            around += _compared(work, work.parked, itemsize)
    candidates = [
        MemoryEstimate((*around, *_group_items(work, group, itemsize)), itemsize) for group in work.groups
    ]
    return max(candidates, key=lambda candidate: candidate.host_bytes)


def _group_items(work: Workload, group: GroupWork, itemsize: int) -> Iterable[MemoryItem]:
    """What is held while one group is solved: batches, statistics and the solver's work space."""
    yield MemoryItem("solver", *solver_bytes(group, itemsize, has_gram=work.parked is not None), ("solve",))
    if group.folded:
        basis = f"{group.folded} numbers of these and later linears, float32"
        yield MemoryItem("folded weights", group.folded * FLOAT32, basis, IN_LAYERS)
    if work.parked is None:
        return
    yield from _parked(work, work.parked, group, itemsize)
    columns = group.columns
    yield MemoryItem(
        "Gram matrix", FLOAT32 * columns**2, f"of the input of {group.name}, float32", ("gram", "solve")
    )
    chunk = min(CHUNK_TOKENS, work.parked.at_groups)
    numbers = chunk * columns
    basis = f"{chunk} tokens x {columns}, the same in float32, and an eighth of the Gram matrix"
    size = itemsize * numbers + FLOAT32 * (numbers + columns**2 // 8)
    yield MemoryItem("chunk", size, basis, ("gram",))
    if count := work.experts_at_once:
        yield MemoryItem(
            "experts' Gram matrices",
            count * expert_gram_bytes(work.expert_columns, work.parked) + FLOAT32 * work.expert_columns**2,
            f"of {count} at once, and of the tokens of all",
            ("gram", "solve"),
        )


def _suspended_bytes(work: Workload, parked: ParkedTokens, width: int, itemsize: int) -> int:
    """Bytes that suspended forwards hold: `width` numbers for a token before a group, and for a token between
    layers its hidden state twice, once as embedding."""
    return itemsize * (width * parked.at_groups + 2 * work.hidden_size * parked.between_layers)


def _parked(work: Workload, parked: ParkedTokens, group: GroupWork, itemsize: int) -> Iterable[MemoryItem]:
    """What the suspended forwards hold before a group, and the batch that runs."""
    batches = parked.batches(work.vocab_size)
    batch = max(tokens for _, tokens in batches)
    if not work.spill_bytes:
        yield MemoryItem(
            "parked batches",
            _suspended_bytes(work, parked, group.width, itemsize),
            f"{parked.at_groups} tokens x {group.width} numbers before {group.name}, "
            f"{parked.between_layers} x {2 * work.hidden_size} between layers",
            IN_LAYERS,
        )
    else:
        basis = f"{batch} tokens x {group.width} numbers; the others' hidden states are on disk"
        yield MemoryItem("rehearsed batch", itemsize * batch * group.width, basis, ("forward", "gram"))
    tables = sum(count for count, _ in batches) * parked.block * work.rotary_width * itemsize
    yield MemoryItem(
        "rotary tables", tables, f"{work.rotary_width} numbers a position of each batch", IN_LAYERS
    )
    if masks := _mask_bytes(work, parked, itemsize):
        yield MemoryItem(
            "attention masks", masks, f"{parked.block} x {parked.block} of each batch", IN_LAYERS
        )
    running = batch * max(2 * work.intermediate_size * itemsize, 3 * work.hidden_size * FLOAT32)
    basis = f"{batch} tokens x 2 intermediates, or 3 hidden states in float32"
    if work.eager:
        running += batch * work.heads * parked.block * (2 * itemsize + FLOAT32)
        basis += ", and 3 copies of the attention scores"
    yield MemoryItem("running batch", running, basis, ("forward",))


def _mask_bytes(work: Workload, parked: ParkedTokens, itemsize: int) -> int:
    """Masks that each batch's forward holds: two of the compute dtype a sequence where attention is eager;
    one of booleans for all sequences where a window is not wider than they are long; none otherwise."""
    kinds = 2 if work.window else 1
    if work.eager:
        return kinds * parked.total * parked.block * itemsize
    if not 0 < work.window <= parked.block:
        return 0
    return sum(count for count, _ in parked.batches(work.vocab_size)) * parked.block**2


def _embedded(work: Workload, parked: ParkedTokens, itemsize: int) -> Iterable[MemoryItem]:
    """Embeddings, and the hidden states that they give."""
    with_head: tuple[Phase, ...] = ("head", "compare") if parked.evaluation else ()
    yield MemoryItem(
        "embeddings or lm_head",
        work.matrix_numbers * itemsize,
        f"{work.matrix_numbers} numbers of {itemsize} bytes; one is given back before the other is read",
        ("embed", *with_head),
    )
    if work.matrix_bytes != work.matrix_numbers * itemsize:
        yield MemoryItem(
            "the same as stored", work.matrix_bytes, "while converted", ("embed", *with_head[:1])
        )
    tokens = parked.total
    if work.spill_bytes:
        tokens = max(batch for _, batch in parked.batches(work.vocab_size))
    basis = f"{tokens} tokens x {work.hidden_size} numbers"
    yield MemoryItem("first hidden states", tokens * work.hidden_size * itemsize, basis, ("embed",))


def _generated(work: Workload, itemsize: int) -> Iterable[MemoryItem]:
    """While the model writes: its layers (all, or one at a time) and the KV cache of unfinished documents."""
    matrices = 2 * work.matrix_numbers * itemsize + work.matrix_bytes
    yield MemoryItem("embeddings and lm_head", matrices, "both, and one as stored", ("generate",))
    layers, basis = work.layers_numbers * itemsize, "all"
    if layers > GENERATION_WEIGHTS_BYTES:
        layers, basis = work.layer_numbers * itemsize, "the largest, each is read when it runs"
    yield MemoryItem("layers that write", layers, basis, ("generate",))
    yield MemoryItem(
        "keys and values", GENERATION_CACHE_BYTES, "at most, of documents side by side", ("generate",)
    )


def _compared(work: Workload, parked: ParkedTokens, itemsize: int) -> Iterable[MemoryItem]:
    """The comparison at the end: hidden states that wait for lm_head, and one batch's logits twice."""
    _, (_, batch) = parked.batches(work.vocab_size)
    if not work.spill_bytes:
        basis = f"2 streams x {parked.evaluation} tokens x {work.hidden_size} numbers"
        last = 2 * parked.evaluation * work.hidden_size * itemsize
        yield MemoryItem("last hidden states", last, basis, ("head", "compare"))
    logits = 2 * batch * work.vocab_size * itemsize
    basis = f"2 streams x {batch} tokens x vocabulary, and 4 float32 chunks"
    yield MemoryItem("logits", logits + COMPARISON_BYTES, basis, ("compare",))
