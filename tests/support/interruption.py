"""A run that stops behind a layer and is taken up again, beside one that is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest

from compression.events import Event, LayerReplayed, LayerSolved, OnEvent
from compression.report import Report


class Run(Protocol):
    """Compresses into a folder, always the same."""

    def __call__(self, output: Path, *, on_event: OnEvent | None = None) -> Report: ...


def interrupted(run: Run, folder: Path, *, layer: int) -> Report:
    """Stop behind a layer and go on: earlier layers are replayed, and the bytes are those of a whole run."""

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == layer:
            raise KeyboardInterrupt

    run(folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "cut", on_event=stop)
    events: list[Event] = []
    report = run(folder / "cut", on_event=events.append)
    replayed = [event.layer for event in events if isinstance(event, LayerReplayed)]
    assert replayed == list(range(layer + 1))
    for shard in (folder / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (folder / "cut" / shard.name).read_bytes()
    return report
