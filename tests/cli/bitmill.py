"""`bitmill` as its users run it: a process, an exit code, and what it printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which is one JSON document."""
        return json.loads(self.out)


def environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Nothing of this process's environment but PATH."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        **{f"BITMILL_{name}": value for name, value in settings.items()},
    }


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cli", *map(str, arguments)]


def bitmill(home: Path, *arguments: str | Path, **settings: str) -> Result:
    """Run a command to its end."""
    done = subprocess.run(
        command(*arguments),
        env=environment(home, settings),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    return Result(done.returncode, done.stdout, done.stderr)
