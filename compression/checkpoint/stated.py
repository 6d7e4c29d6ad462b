"""The dtype that a config.json states: in which readers load a model unless they are told another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS = ("dtype", "torch_dtype")
"""The name that Transformers 5 writes, and the one before it."""


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """bfloat16, float16, ...: what is stated for the whole, else for the decoder; None where nothing is."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in _KEYS:
            if isinstance(part.get(key), str):
                return str(part[key]).removeprefix("torch.")
    return None


def in_bfloat16(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a model in bfloat16: the whole states it, and so does every part that states a dtype."""
    changed = {
        name: _restated(part) if name.endswith("_config") and isinstance(part, Mapping) else part
        for name, part in _restated(config).items()
    }
    return changed if any(key in changed for key in _KEYS) else {**changed, "dtype": "bfloat16"}


def _restated(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "bfloat16" if name in _KEYS else value for name, value in part.items()}
