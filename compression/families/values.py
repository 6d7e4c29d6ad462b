"""Values of config.json that Transformers cannot build a model from; each problem names its field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compression.errors import Problem
from compression.families.configuration import rope_parameters
from compression.families.native_values import ACTIVATIONS, ROPE_TYPES
from compression.families.structure import Family


def value_problems(
    config: Mapping[str, Any], text: Mapping[str, Any], family: Family, vocab: int
) -> list[Problem]:
    """What a decoder of these sizes cannot be built from. config: the whole; text: where the decoder is."""
    return [
        *_activations(config, text, family),
        *_padding(text, family, vocab),
        *(_rotary(text, family) if family.rope_types else ()),
    ]


def _activations(config: Mapping[str, Any], text: Mapping[str, Any], family: Family) -> Iterator[Problem]:
    stated = {family.activation_key: text.get(family.activation_key)}
    if family.vision.modules:
        tower = config.get("vision_config")
        of_tower = tower.get("hidden_act") if isinstance(tower, dict) else None
        stated |= {
            "vision_config.hidden_act": of_tower,
            "projector_hidden_act": config.get("projector_hidden_act"),
        }
    for key, value in stated.items():
        if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
            yield _problem(
                f"{key} is {_shown(value)}, which is no activation function of Transformers.",
                f"It knows {', '.join(sorted(ACTIVATIONS))}.",
            )


def _padding(text: Mapping[str, Any], family: Family, vocab: int) -> Iterator[Problem]:
    """The embeddings have a row for the padding token, counted from the end where it is negative."""
    token = text.get("pad_token_id", family.defaults.get("pad_token_id"))
    if token is None or (type(token) is int and -vocab <= token < vocab):
        return
    said = "" if "pad_token_id" in text else ", the default of this model type,"
    yield _problem(
        f"pad_token_id is {_shown(token)}{said} and the vocabulary has {vocab} tokens.",
        "Set it to a token of the vocabulary, or to null.",
    )


def _rotary(text: Mapping[str, Any], family: Family) -> Iterator[Problem]:
    for key in ("rope_scaling", "rope_parameters"):
        if text.get(key) is not None and not isinstance(text[key], dict):
            yield _problem(f"{key} is {_shown(text[key])}, and must be an object or null.")
    for where, stated in rope_parameters(text).items():
        named = "rope_type" if "rope_type" in stated else "type"
        kind = stated.get(named, "default")
        meant = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else None
        if meant not in family.rope_types:
            yield _problem(
                f"{where}.{named} is {_shown(kind)}, which is no kind of rotary embedding that Transformers "
                "has for this model type.",
                f"It has {', '.join(family.rope_types)}.",
            )
        elif missing := sorted(key for key in ROPE_TYPES[meant] if key not in stated):
            yield _problem(f"{where} of the kind {kind} has no {' and no '.join(missing)}.")


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _problem(message: str, hint: str = "") -> Problem:
    return Problem("config_invalid", f"config.json: {message}", hint, "/model")
