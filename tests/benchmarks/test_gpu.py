"""`python -m benchmarks.gpu` on tiny models: it runs, and writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


def rows(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    gpu.main([*arguments, "--tiny", "--out", str(folder)])
    written: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    found: list[dict[str, Any]] = written["rows"]
    assert (folder / "gpu.md").read_text().count("\n| ") >= len(found)
    return found


def test_every_run_on_the_cpu(tmp_path: Path) -> None:
    found = rows(tmp_path, "--device", "cpu")
    assert {(row["model"], row["recipe"]) for row in found} == {
        *((model, recipe) for model in ("small", "large") for recipe in gpu.RECIPES),
        ("experts", "gptq W4A16"),
    }
    assert {row["note"] for row in found} == {"", "resumed behind layer 0", "text by the model"}
    assert all(row["phases"]["solve"] > 0 for row in found)
    assert all(row["perplexity_compressed"] > 1 and row["relative_error"] > 0 for row in found)


def test_on_the_pretended_gpu_it_counts_and_compares(tmp_path: Path) -> None:
    on_gpu, on_cpu = rows(tmp_path, "--device", "fake", "--models", "experts")
    assert (on_gpu["device"], on_cpu["device"]) == ("cuda:0", "cpu")
    assert 0 < on_gpu["peak_bytes"] < on_gpu["estimated_bytes"]
    assert on_gpu["layer"]["launches"] > on_gpu["layer"]["syncs"] > on_gpu["layer"]["copies"] > 0
    assert "| experts | gptq W4A16 |" in (tmp_path / "gpu.md").read_text().partition("GPU / CPU")[2]


def test_a_run_that_fails_leaves_no_pretended_gpu() -> None:
    with pytest.raises(KeyError), gpu._pretended(True):
        raise KeyError
    assert gpu._fake is None
