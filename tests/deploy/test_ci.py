"""What continuous integration runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ci_runs_check_and_test_and_stops_at_the_first_failure() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert re.findall(r"^make \w+$", text, re.MULTILINE) == ["make check", "make test"]


def test_the_makefile_has_its_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {
        "install",
        "demo",
        "test",
        "check",
        "test-peer",
        "test-vllm",
        "test-generator",
        "bench",
        "lock",
        "clean",
        "help",
    } <= targets
