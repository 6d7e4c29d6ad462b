"""What is logged, read back as whoever collects logs would read it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import structlog

from api.observability import configure_logging
from api.settings import Settings


class Logged:
    """Records since the test began."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def records(self, event: str | None = None) -> list[dict[str, Any]]:
        """All records in order, or those of an event."""
        found = [json.loads(line) for line in self.text.splitlines()]
        return [record for record in found if event in (None, record["event"])]


@contextmanager
def own_logging() -> Iterator[None]:
    """Puts logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()


@contextmanager
def logging_here(folder: Path) -> Iterator[Logged]:
    """Log as a service does that logs everything there is."""
    stream = io.StringIO()
    with own_logging():
        with redirect_stderr(stream):
            configure_logging(Settings(data_dir=folder, log_level="debug", log_format="json"))
        yield Logged(stream)
