"""What an engine process says: one JSON object a line, {"type": ..., "data": {...}}.

Strings come out so that every database can keep them. NaN and Infinity, which JSON does not have, are null.
"""

from __future__ import annotations

import json
import re
from typing import Any

TERMINAL = ("succeeded", "failed")
"""Types of a process's last message."""
_SHOWN_BYTES = 200
_NOT_STORABLE = re.compile("[\\x00\\ud800-\\udfff]")
_REPLACEMENT = "\ufffd"

Message = dict[str, Any]


class BadMessage(Exception):
    """A line that is no message."""


def parse(line: bytes) -> Message:
    """The message of a line.

    Raises:
        BadMessage: the line is not JSON, or not a message.
    """
    try:
        message = json.loads(line, parse_constant=lambda _name: None)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"{line[:_SHOWN_BYTES]!r}: {error}") from error
    if not (
        isinstance(message, dict)
        and isinstance(message.get("type"), str)
        and isinstance(message.get("data"), dict)
    ):
        raise BadMessage(f"{line[:_SHOWN_BYTES]!r}")
    if b"\\u0000" in line or b"\\ud" in line.lower():  # JSON's escapes of what `storable` replaces
        cleaned: Message = storable(message)
        return cleaned
    return message


def storable(value: Any) -> Any:
    """The same value with U+FFFD for what PostgreSQL or UTF-8 cannot hold: U+0000 and halves of surrogate
    pairs. They come from texts, tokens and names of other people's files."""
    match value:
        case str():
            return _NOT_STORABLE.sub(_REPLACEMENT, value)
        case list():
            return [storable(item) for item in value]
        case dict():
            return {storable(name): storable(item) for name, item in value.items()}
    return value
