"""A job's report in other forms than its own JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any


def as_csv(report: Mapping[str, Any]) -> str:
    """The modules' rows (RFC 4180), one a line under the names of their fields; a shape is two columns."""
    rows = [_flat(row) for row in report["modules"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "shape":
            flat["rows"], flat["columns"] = value
        else:
            flat[name] = value
    return flat
