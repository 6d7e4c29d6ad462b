"""Handing a new attempt what earlier ones finished: the engine's own journal, and the shards beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from api.jobs.ledger.models import JobLayer
from api.store.base import Check, ObjectNotFound, Store
from compression.events import JOURNAL_FILE
from worker.patience import patiently


def restore(
    store: Store, header: dict[str, Any], layers: Sequence[JobLayer], partial: Path, check: Check
) -> list[int]:
    """Write `<output_dir>.partial` as the interrupted engine left it. Returns the layers that the store lost.

    header: the resolved plan. The engine checks each shard's digest itself and solves again what is missing
    or damaged, so nothing is read here: on one file system a shard arrives as a hard link. check: whatever it
    raises ends this.
    """
    partial.mkdir()
    lines = [header]
    lost = []
    for row in layers:
        try:
            patiently(check, store.get, row.store_key, partial / row.entry["file"], check)
        except ObjectNotFound:
            lost.append(row.layer)
        else:
            lines.append(row.entry)
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    path = partial / JOURNAL_FILE
    path.parent.mkdir()
    path.write_text(journal, encoding="utf-8")
    return lost
