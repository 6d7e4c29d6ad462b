"""The version of the engine, which is part of what makes two runs the same work."""

from __future__ import annotations

VERSION = "0.1.0"
