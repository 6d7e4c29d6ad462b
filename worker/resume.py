"""Gives a new attempt what earlier ones finished: the engine's journal, and the shards beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from api.jobs.ledger.models import JobLayer
from api.private import make_folder, opener
from api.store.base import Check, ObjectNotFound, Store
from compression.events import JOURNAL_FILE
from worker.retry import retry_store


def restore(
    store: Store, header: dict[str, Any], layers: Sequence[JobLayer], partial: Path, check: Check
) -> list[int]:
    """Write `<output_dir>.partial` as the interrupted engine left it. Returns the layers that the store lost.

    The engine checks each shard's digest itself, and solves again what is missing or damaged. So nothing is
    read here: on one file system a shard arrives as a hard link.

    header: the resolved plan. check: what it raises ends this.
    """
    make_folder(partial)
    lines = [header]
    lost = []
    for row in layers:
        try:
            retry_store(check, store.get, row.store_key, partial / row.entry["file"], check)
        except ObjectNotFound:
            lost.append(row.layer)
        else:
            lines.append(row.entry)
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    path = partial / JOURNAL_FILE
    make_folder(path.parent)
    with open(path, "w", encoding="utf-8", opener=opener) as file:
        file.write(journal)
    return lost
