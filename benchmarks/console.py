"""What a measurement says while it runs."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
