"""Killed at random moments, a run of every method ends with the bytes of one that was left alone.

`python -m benchmarks.kills` kills more often, and at other moments every time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kills import RECIPES, compare


@pytest.mark.parametrize("steps", RECIPES)
def test_a_killed_run_ends_with_the_same_bytes(steps: str, tiny_texts: Path, tmp_path: Path) -> None:
    compare(tmp_path, tiny_texts, RECIPES[steps], kills=2, seed=0)
