"""Calibration text of benchmarks: the Python language reference that ships inside every CPython."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics


def write_python_reference(path: Path) -> Path:
    """Writes one topic a line, in the column `text`, to the .jsonl file `path`; returns `path`.

    The order is that of the topics' names, so the bytes depend on the Python release alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        for name in sorted(topics):
            file.write(json.dumps({"topic": name, "text": topics[name]}, ensure_ascii=False) + "\n")
    os.chmod(file.name, 0o644)
    os.rename(file.name, path)
    return path
