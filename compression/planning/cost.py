"""What a run costs beside memory: room on disk, and time.

Disk is counted to the byte. Time is a range: the plan's work over low and high speeds of a class of hardware.

Work is counted in four kinds that different parts of a machine do: operations of matrix products (forward
passes, Gram matrices, error feedback), numbers that element-wise steps touch (searches of scales, rounding,
packing), columns that are walked one after the other, and bytes that are read and written. Nothing is known
of the worker at submission, so the range is wide on purpose: from an old core to a large server, from a small
inference card to an H100. Downloads and the time in the queue are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compression.families.decoder import Decoder
from compression.methods import Cost, Linears, method_of
from compression.planning.memory import ParkedTokens, Workload
from compression.planning.solver_memory import GroupWork
from compression.recipe import Recipe

_SEARCH_TRIES = 16
"""Shrinks that an observer tries: 1, nine coarse ones and three pairs of fine ones."""
_TRY_TOUCHES, _OTHER_TOUCHES = 6, 40
"""Numbers read or written a weight: in one try of a search; in all else, packing most."""
_GRAM_SHARE = 1.125
"""Operations a token and a square of the columns: the panels on and above the diagonal."""


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second. start: seconds until a process works."""

    operations: float
    touches: float
    columns: float
    bytes: float
    start: float


SPEEDS: Mapping[str, tuple[Speed, Speed]] = {
    "cpu": (
        Speed(operations=4e10, touches=3e8, columns=1e4, bytes=1e8, start=40),
        Speed(operations=5e12, touches=2e10, columns=1e5, bytes=3e9, start=2),
    ),
    "cuda": (
        Speed(operations=4e12, touches=1e10, columns=5e3, bytes=1e8, start=60),
        Speed(operations=4e14, touches=2.5e11, columns=5e4, bytes=3e9, start=5),
    ),
}
"""By class, low and high. cpu: one core without 16-bit products does 5.7e10 operations (Zen 3, float32), a
server with hundreds of cores and AMX a hundred times that. cuda: a T4 in float32, and 40% of an H100's peak
in 16 bits; columns are walked by kernels that take 5 to 10 microseconds to launch. Measured on CPUs only."""


@dataclass(frozen=True)
class Duration:
    """The work of a run, and the seconds that it takes at most and at least in each class of hardware."""

    operations: float
    touches: float
    columns: float
    bytes: float

    def seconds(self, speed: Speed) -> float:
        return (
            speed.start
            + self.operations / speed.operations
            + self.touches / speed.touches
            + self.columns / speed.columns
            + self.bytes / speed.bytes
        )

    def range(self, device_class: str) -> tuple[float, float]:
        """(least, most) seconds on a worker of the class `cpu` or `cuda`."""
        low, high = SPEEDS[device_class]
        return self.seconds(high), self.seconds(low)

    def to_dict(self) -> dict[str, Any]:
        ranges = {}
        for device_class in SPEEDS:
            least, most = self.range(device_class)
            ranges[device_class] = {"least": round(least, 1), "most": round(most, 1)}
        items = [
            ("matrix products", self.operations, "operations"),
            ("element-wise steps", self.touches, "numbers read or written"),
            ("error feedback", self.columns, "columns, one after the other"),
            ("disk", self.bytes, "bytes"),
        ]
        return {
            "seconds": ranges,
            "items": [{"name": name, "amount": round(amount), "unit": unit} for name, amount, unit in items],
        }


def duration(decoder: Decoder, recipe: Recipe, work: Workload, *, moved_bytes: int) -> Duration:
    """moved_bytes: weights read, written and read back."""
    operations, touches, columns = 0.0, 0.0, 0.0
    share = work.active_experts / work.experts if work.experts else 1.0
    for group, count in work.groups.items():
        tokens = work.parked.at_groups if work.parked else 0
        operations += count * _statistics(group, tokens, share, decoder)
        operations += count * _report(group, has_gram=tokens > 0)
        touches += count * group.rows * group.columns * _touches(recipe)
        for cost in _costs(group, recipe):
            operations += count * cost.operations
            columns += count * cost.columns
            touches += count * cost.rounded * _touches(recipe)
    moved = float(moved_bytes)
    if work.parked:
        passes, spilled = _forward(decoder, work, work.parked, share)
        operations, moved = operations + passes, moved + spilled
    return Duration(operations, touches, columns, moved)


def _statistics(group: GroupWork, tokens: int, share: float, decoder: Decoder) -> float:
    """Of the Gram matrix of one group; of a starved expert also of that of all tokens."""
    one = _GRAM_SHARE * group.columns**2
    if not group.expert:
        return tokens * one
    seen = tokens * share
    if seen >= group.columns or group.columns == decoder.hidden_size:
        return seen * one  # gate and up of all starved experts share one matrix
    inner = 2 * 2 * decoder.hidden_size * group.columns  # what down reads is made again
    return (seen + tokens) * (one + inner)


def _costs(group: GroupWork, recipe: Recipe) -> Iterator[Cost]:
    """Of every step that a group goes through."""
    linears = Linears(group.rows, group.columns, -(-group.rows // group.largest_rows))
    for step in {step.type: step for step in recipe.steps}.values():
        if step is recipe.smoothing or step.type in group.methods:
            yield method_of(step).cost(step, linears)


def _report(group: GroupWork, *, has_gram: bool) -> float:
    """Of what is said of the output that is lost: two products with the Gram matrix."""
    return 4.0 * group.rows * group.columns**2 if has_gram else 0.0


def _touches(recipe: Recipe) -> int:
    """Numbers read or written a weight, when it is solved."""
    searches = sum(step.observer != "minmax" for step in recipe.quantizing.values())
    return _OTHER_TOUCHES + searches * _SEARCH_TRIES * _TRY_TOUCHES


def _forward(decoder: Decoder, work: Workload, parked: ParkedTokens, share: float) -> tuple[float, float]:
    """Operations of all passes, and bytes of hidden states that move.

    Each token goes once through every layer, the held-out ones also through lm_head. Where hidden states are
    on disk, those from which statistics are taken run once more up to each group; each pass reads them.
    """
    operations, moved = 2.0 * parked.evaluation * 2 * decoder.vocab_size * decoder.hidden_size, 0.0
    for shape, layers in decoder.kinds():
        whole = 2.0 * parked.block * decoder.sizes["q"]  # scores and values, of half the positions
        before, rehearsals, has_experts = 0.0, 0, False
        for group in shape.groups:
            if not group.experts:
                before, rehearsals = before + whole, rehearsals + 1
            size = sum(2 * out * inp for out, inp in map(decoder.shape, group.linears))
            whole += size * share if group.experts else size
            has_experts = has_experts or bool(group.experts)
        operations += layers * whole * parked.total
        if work.spill_bytes:
            sweeps = 2 * -(-work.experts // work.experts_at_once) if has_experts else 0
            operations += layers * (before + sweeps * whole) * parked.at_groups
            moved += layers * (2 + rehearsals + sweeps) * work.spill_bytes
    return operations, moved


RECORD_BYTES = 256 << 10
"""Allowance for config, card and recipe."""
MODULE_RECORD_BYTES = 3 << 10
"""Allowance for what plan, report, journal and index say of one linear."""


@dataclass(frozen=True)
class DiskItem:
    """One part, and how it was found."""

    name: str
    bytes: int
    basis: str


@dataclass(frozen=True)
class DiskEstimate:
    """What is there together at the end of a run; the scratch file goes away with the process."""

    items: tuple[DiskItem, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        items = [{"name": item.name, "bytes": item.bytes, "basis": item.basis} for item in self.items]
        return {"bytes": self.bytes, "items": items}


def disk_estimate(
    *, output_bytes: int, copied_bytes: int, copied_files: int, linears: int, spill_bytes: int
) -> DiskEstimate:
    """output_bytes: of all shards, exact; copied: the source's other files; spill_bytes: hidden states."""
    records = RECORD_BYTES + linears * MODULE_RECORD_BYTES
    items = [
        DiskItem("weights", output_bytes, "every shard, to the byte"),
        DiskItem("copied files", copied_bytes, f"{copied_files} files of the source"),
        DiskItem(
            "records", records, f"config, card, recipe; plan, report, journal, index of {linears} linears"
        ),
    ]
    if spill_bytes:
        items.append(DiskItem("hidden states", spill_bytes, "scratch file, gone at the end"))
    return DiskEstimate(tuple(items))
