"""This version's bytes compared with its own: a model with a vision tower, and one with stacked experts."""

from __future__ import annotations

from pathlib import Path

from benchmarks.same_bytes import ROOT, differences, digests, make_inputs


def test_a_version_writes_its_own_bytes_and_what_differs_is_listed(tmp_path: Path) -> None:
    make_inputs(tmp_path / "inputs", ("llama4_text", "llava"))
    first, second = (digests(ROOT, tmp_path / "inputs", tmp_path / n, "rtn W8A16") for n in ("one", "two"))
    assert first.keys() == {"llama4_text, rtn W8A16", "llava, rtn W8A16"}
    assert all("config.json" in files and len(files) > 2 for files in first.values())
    assert differences(first, second) == {}
    case = "llava, rtn W8A16"
    files = {**first[case], "config.json": "another", "new.safetensors": ""}
    changed = {case: files, "llama, rtn W8A16": {"config.json": "of a model that is new"}}
    assert differences(first, changed) == {
        "llama4_text, rtn W8A16": sorted(first["llama4_text, rtn W8A16"]),
        case: ["config.json", "new.safetensors"],
        "llama, rtn W8A16": ["config.json"],
    }
