"""No host's clock decides anything: what has to do with times asks the database for them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
"""By what they are called on: functions that give the host's time of day."""
HARMLESS = {"worker/cache_key.py": 1, "worker/telemetry.py": 1}
"""Readings by which no job is judged: one is compared with what the same clock wrote, the ctime of a file;
one is when a span began."""


def readings(tree: ast.AST) -> Iterator[str]:
    """Where it is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = (
                node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            )
            if node.attr in HOSTS.get(owner, ()):
                yield f"line {node.lineno}: {owner}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (
                f"line {node.lineno}: {alias.name}" for alias in node.names if alias.name in HOSTS["time"]
            )


def test_no_module_reads_it() -> None:
    paths = [path for folder in ("api", "worker") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): list(readings(ast.parse(path.read_text()))) for path in paths}
    assert {path: len(places) for path, places in found.items() if places} == HARMLESS, found
    assert len(found) > 50


def test_a_reading_would_be_found() -> None:
    found = sorted(readings(ast.parse("import datetime\ndatetime.datetime.now()\nfrom time import time\n")))
    assert found == ["line 2: datetime.now", "line 3: time"]
