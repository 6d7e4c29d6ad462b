"""Where the Hub is and where its files are kept: the variables that every Hugging Face library reads.

A server's operator sets them; nothing of a request gets here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

DEFAULT_ENDPOINT = "https://huggingface.co"
CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class HubEnvironment:
    """endpoint: HF_ENDPOINT. home: HF_HOME. cache: HF_HUB_CACHE, shared with all Hugging Face libraries.
    token: HF_TOKEN, or what `hf auth login` left. offline: HF_HUB_OFFLINE, only what is cached is used."""

    endpoint: str
    home: Path
    cache: Path
    token: str | None = field(repr=False)
    offline: bool

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Self:
        """From the environment, with the defaults of the Hugging Face libraries."""
        above = Path(variables.get("XDG_CACHE_HOME") or "~/.cache")
        home = Path(variables.get("HF_HOME") or above / "huggingface").expanduser()
        return cls(
            endpoint=(variables.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/"),
            home=home,
            cache=Path(variables.get("HF_HUB_CACHE") or home / "hub").expanduser(),
            token=variables.get("HF_TOKEN") or _stored_token(home, variables),
            offline=variables.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        )


def _stored_token(home: Path, variables: Mapping[str, str]) -> str | None:
    path = Path(variables.get("HF_TOKEN_PATH") or home / "token").expanduser()
    try:
        return path.read_text().strip() or None
    except (OSError, ValueError):  # not there, or no text
        return None
