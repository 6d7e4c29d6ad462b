"""docker-compose.yml as Compose reads it, as far as ours needs that: variables filled in, anchors merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRETS = {"POSTGRES_PASSWORD": "aa", "S3_SECRET_KEY": "bb"}
"""What an operator fills in."""


def variables(text: str) -> dict[str, str | None]:
    """The variables that a file asks for, with the defaults it gives."""
    return {name: default if kind == "-" else None for name, kind, default in _VARIABLE.findall(text)}


def lines(file: str) -> dict[str, str]:
    """What a file of variables sets."""
    text = (ROOT / file).read_text()
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def load(file: str = "docker-compose.yml") -> dict[str, Any]:
    """A Compose file, for an operator who filled in the secrets of deploy/example.env."""
    known = lines("deploy/example.env") | SECRETS
    text = (ROOT / file).read_text()
    filled = _VARIABLE.sub(lambda found: known.get(found[1], found[3]), text)
    document: dict[str, Any] = yaml.safe_load(filled)
    return document


def environment(service: dict[str, Any]) -> dict[str, str]:
    """All variables of a service's container."""
    from_files = {name: value for file in service.get("env_file", ()) for name, value in lines(file).items()}
    return from_files | {name: str(value) for name, value in service.get("environment", {}).items()}
