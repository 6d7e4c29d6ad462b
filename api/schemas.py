"""What schemas of several folders share."""

from __future__ import annotations

from typing import Any


def all_required(schema: dict[str, Any]) -> None:
    """For schemas of answers: every field is required, because an answer always has it, even one with a
    default."""
    schema["required"] = list(schema["properties"])
