"""Ids: a prefix and a ULID, which sorts by time."""

from __future__ import annotations

import secrets
from datetime import datetime

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str, now: datetime) -> str:
    """`<prefix>_` and a ULID: 48 bits of milliseconds and 80 random ones, in base 32."""
    return new_ids(prefix, now, 1)[0]


def new_ids(prefix: str, now: datetime, count: int) -> list[str]:
    """That many ids in ascending order."""
    first = int(now.timestamp() * 1000) << 80 | secrets.randbits(79)
    return [f"{prefix}_{_base32(first + number)}" for number in range(count)]


def _base32(number: int) -> str:
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
