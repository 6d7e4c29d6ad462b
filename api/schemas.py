"""What schemas of several parts share."""

from __future__ import annotations

from typing import Any


def all_required(schema: dict[str, Any]) -> None:
    """Of an answer, which has every field, also where the class has a default for it."""
    schema["required"] = list(schema["properties"])
