"""What a running compression tells its caller, one frozen dataclass per event.

`to_dict` gives {"type": ..., "data": {...}}: JSON that a supervisor in another process reads line by line.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

PARTIAL_SUFFIX = ".partial"
"""A run works in `<output_dir>.partial` and publishes by renaming it."""

JOURNAL_FILE = ".bitmill/journal.jsonl"
"""The journal in that folder. To resume elsewhere: write it from `PlanResolved.header` and every
`LayerSolved.entry`, one JSON object a line, and put the shards that the entries name beside it."""

Phase = Literal["fetch", "plan", "generate", "compress", "verify", "upload"]


@dataclass(frozen=True)
class Event:
    """Base of all events; `type` is the stable name that the API shows."""

    type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """{"type", "data"}, ready for JSON."""
        return {"type": self.type, "data": dataclasses.asdict(self)}


@dataclass(frozen=True)
class PhaseChanged(Event):
    type: ClassVar[str] = "phase_changed"
    phase: Phase


@dataclass(frozen=True)
class FetchProgress(Event):
    """What of a model (bytes) or of a dataset has come from the Hub (rows) or S3 (bytes).

    total: None for rows.
    """

    type: ClassVar[str] = "fetch_progress"
    what: Literal["model", "dataset"]
    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class GenerationProgress(Event):
    """Tokens of calibration text that the model has written, of those that are needed."""

    type: ClassVar[str] = "generation_progress"
    done: int
    total: int


@dataclass(frozen=True)
class PlanResolved(Event):
    """The resolved plan, which a later attempt must obey to give the same bytes: the journal's first line."""

    type: ClassVar[str] = "plan_resolved"
    header: dict[str, Any]


@dataclass(frozen=True)
class LayerSolved(Event):
    """A layer's shard is on disk and journaled. `entry` is its journal line: file, sha256, size, report.

    relative_error: mean over the layer's modules of |XW - XW'|^2 / |XW|^2 (None without data).
    seconds: time this layer took. eta_seconds: expected time until the last layer is done.
    """

    type: ClassVar[str] = "layer_solved"
    layer: int
    layers_total: int
    relative_error: float | None
    seconds: float
    eta_seconds: float
    entry: dict[str, Any]


@dataclass(frozen=True)
class LayerReplayed(Event):
    """A layer that an earlier attempt finished: its forward pass was repeated, nothing was solved."""

    type: ClassVar[str] = "layer_replayed"
    layer: int
    layers_total: int
    seconds: float


@dataclass(frozen=True)
class WarningRaised(Event):
    type: ClassVar[str] = "warning"
    code: str
    message: str


OnEvent = Callable[[Event], None]


class Teller:
    """Events about one thing that goes on in many more steps than anyone wants to hear of.

    make: the event for (done, total), which is emitted every `seconds` at most, and at the end.
    """

    def __init__(self, on_event: OnEvent, make: Callable[[int, Any], Event], seconds: float = 2.0) -> None:
        self._on_event = on_event
        self._make = make
        self._seconds = seconds
        self._told_at = time.monotonic()
        self._told = -1

    def __call__(self, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        if done != self._told and (now - self._told_at >= self._seconds or done == total):
            self._told, self._told_at = done, now
            self._on_event(self._make(done, total))
