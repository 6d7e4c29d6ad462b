"""The benchmarks' calibration text: the whole of it, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.python_reference import write_python_reference


def test_the_text_is_pythons_reference_one_topic_a_line(tmp_path: Path) -> None:
    path = write_python_reference(tmp_path / "data" / "topics.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["topic"]: row["text"] for row in rows} == topics
    first = path.read_bytes()
    assert write_python_reference(path).read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == ["topics.jsonl"]
