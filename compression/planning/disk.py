"""How much room a run takes in its output folder, item by item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
