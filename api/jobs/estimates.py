"""What POST /v1/jobs/estimate answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import all_required


class MemoryPart(BaseModel):
    """One part of a peak, and how it was found: with basis exact, when it is held; with guide, where."""

    model_config = ConfigDict(json_schema_extra=all_required)

    name: str
    bytes: int
    basis: str
    phases: list[str] | None = None
    on: Literal["host", "gpu"] | None = None


class MemoryRead(BaseModel):
    """The peak. basis: exact, of this engine, or guide, by the rules of LLM Compressor's guide."""

    basis: str
    host_bytes: int
    gpu_bytes: int
    items: list[MemoryPart]


class MemoryBases(BaseModel):
    """The same by two sets of rules."""

    exact: MemoryRead
    guide: MemoryRead


class DiskPart(BaseModel):
    """One part of what lies in the worker's scratch folder."""

    name: str
    bytes: int
    basis: str


class DiskRead(BaseModel):
    """What a worker's scratch folder holds."""

    bytes: int
    items: list[DiskPart]


class SecondsRange(BaseModel):
    """On the fastest and the slowest hardware of a class."""

    least: float
    most: float


class Work(BaseModel):
    """Work of one kind, from which times are made."""

    name: str
    amount: int
    unit: str


class DurationRead(BaseModel):
    """seconds: by device class, cpu and cuda."""

    seconds: dict[str, SecondsRange]
    items: list[Work]


class WarningRead(BaseModel):
    """What a plan warns of."""

    code: str
    message: str
    hint: str


class Estimate(BaseModel):
    """What a job would take, itemized. docs/memory.md says how it is made, and how near it comes."""

    source_bytes: int
    output_bytes: int = Field(description="Of all weights that are written, to the byte.")
    memory: MemoryBases
    disk: DiskRead
    duration: DurationRead
    warnings: list[WarningRead]
