"""Where the peer is: LLM Compressor, in a virtual environment of its own (`make test-peer`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def in_peer(script: str, folder: Path, *arguments: str | Path, request: str = "") -> None:
    """Run one of the scripts here by the peer's interpreter, in `folder`; `request` is its standard input."""
    path = Path(__file__).with_name(script)
    command = [PYTHON, path, *arguments]
    subprocess.run(command, input=request, text=True, check=True, cwd=folder, env=ENVIRONMENT)
