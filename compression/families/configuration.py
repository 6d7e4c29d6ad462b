"""config.json as readers take it: what it leaves open decided, so that engine and output agree with them.

No torch and no Transformers: the control plane plans with the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.families.native_values import NEVER_NULL
from compression.families.structure import Family

_TIED = "tie_word_embeddings"
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
_NEVER_NULL_IN_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def text_config(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Where the decoder is stated. Before `text_config`, Qwen2.5-VL had its keys among those of the whole."""
    text = config.get("text_config")
    return text if family.vision.text_type and isinstance(text, dict) else config


def as_read(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config with every null that Transformers refuses resolved, and every kind of rotary embedding under
    the name of today; all other keys as they are.

    Without `num_key_value_heads` there are as many as heads; any other key is then absent, so that its
    default holds. Nulls that mean something, such as that of `sliding_window`, stay.
    """
    resolved = _part_as_read(config, family)
    if text_config(config, family) is not config:
        resolved["text_config"] = _part_as_read(config["text_config"], family)
    return resolved


def ties(config: Mapping[str, Any], family: Family) -> bool:
    """Whether config.json says that lm_head is the embeddings; of the whole and its decoder, one suffices."""
    parts = (config, text_config(config, family))
    said = [part[_TIED] for part in parts if part.get(_TIED) is not None]
    return any(value is True for value in said or [family.defaults.get(_TIED)])


def with_ties(config: Mapping[str, Any], family: Family, tied: bool) -> dict[str, Any]:
    """The config, saying in every place where readers look whether lm_head is the embeddings."""
    text = text_config(config, family)
    told = {**config, _TIED: tied}
    if text is not config:
        told["text_config"] = {**text, _TIED: tied}
    return told


def rope_parameters(text: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What config.json says of rotary frequencies, by the keys that lead there.

    Of more than one kind of layers each has its own (Gemma 3). What is no object is none.
    """
    stated: dict[str, dict[str, Any]] = {}
    for key in _ROPE_KEYS:
        whole = text.get(key)
        if not isinstance(whole, dict) or not whole:
            continue
        nested = {name: part for name, part in whole.items() if isinstance(part, dict)}
        stated |= {f"{key}.{name}": part for name, part in nested.items()} or {key: whole}
    return stated


def _part_as_read(part: Mapping[str, Any], family: Family) -> dict[str, Any]:
    resolved = {key: value for key, value in part.items() if value is not None or key not in NEVER_NULL}
    heads = part.get("num_attention_heads")
    if "num_key_value_heads" in part and part["num_key_value_heads"] is None and heads is not None:
        resolved["num_key_value_heads"] = heads
    for key in _ROPE_KEYS:
        if isinstance(part.get(key), dict):
            resolved[key] = _rope_as_read(part[key], family)
    return resolved


def _rope_as_read(rope: Mapping[str, Any], family: Family) -> dict[str, Any]:
    return {
        key: _rope_as_read(value, family) if isinstance(value, dict) else _kind_as_read(key, value, family)
        for key, value in rope.items()
        if value is not None or key not in _NEVER_NULL_IN_ROPE
    }


def _kind_as_read(key: str, value: Any, family: Family) -> Any:
    names_kind = key in ("rope_type", "type") and isinstance(value, str)
    return family.rope_aliases.get(value, value) if names_kind else value
