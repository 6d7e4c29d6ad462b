"""Wheels from the package index, by this interpreter's pip, kept in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


class DownloadFailed(Exception):
    """The package index did not give the wheel."""


def fetch_wheel(requirement: str, pattern: str, cache: Path) -> Path:
    """The wheel in `cache` whose name fits the glob `pattern`, downloaded without dependencies if need be.

    It appears in one rename, so a broken download leaves no wheel behind.

    Raises:
        DownloadFailed: with what pip said.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if kept := sorted(cache.glob(pattern)):
        return kept[0]
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += [] if sys.stderr.isatty() else ["--quiet"]  # who waits at a terminal sees pip's bar
        command += ["--dest", scratch, requirement]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        found = sorted(Path(scratch).glob(pattern))
        if done.returncode != 0 or not found:
            raise DownloadFailed(f"pip could not download {requirement}: {done.stderr.strip()[-500:]}")
        wheel = cache / found[0].name
        os.rename(found[0], wheel)
    return wheel
