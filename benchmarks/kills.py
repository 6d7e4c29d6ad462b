"""`python -m benchmarks.kills [KILLS]`: runs of every method, killed at random moments until they finish."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.support.kills import RECIPES, compare
from tests.support.models import tiny_dataset


def main(kills: int = 10) -> None:
    """Kill each run `kills` times. One whose bytes differ from an uninterrupted run's ends this."""
    seed = time.time_ns()
    console = Console()
    console.print(f"seed {seed}")
    for name, steps in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            texts = tiny_dataset(Path(folder) / "texts.jsonl")
            compare(Path(folder), texts, steps, kills=kills, seed=seed)
        console.print(f"{name}: {kills} kills, the same bytes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
