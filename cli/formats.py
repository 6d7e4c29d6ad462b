"""Numbers as people read them."""

from __future__ import annotations

_BYTE_UNITS = ("kB", "MB", "GB", "TB")


def bytes_text(count: float) -> str:
    """Decimal units with three significant digits: 269.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in _BYTE_UNITS:
        count /= 1000
        if count < 999.5 or unit == _BYTE_UNITS[-1]:
            break
    return f"{count:.2f} {unit}" if count < 10 else f"{count:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """0.42 s, 12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
