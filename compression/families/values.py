"""Values of config.json that Transformers cannot build a model from; each problem names its field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compression.errors import Problem
from compression.families.configuration import rope_parameters
from compression.families.native_values import ACTIVATIONS, ROPE_TYPES
from compression.families.structure import Family


def value_problems(
    config: Mapping[str, Any], text: Mapping[str, Any], family: Family, vocab: int, head: int
) -> list[Problem]:
    """What a decoder of these sizes cannot be built from. config: the whole; text: where the decoder is;
    head: how many numbers of a head have positions."""
    return [
        *_activations(config, text, family),
        *_padding(text, family, vocab),
        *(_rotary(text, family, head) if family.rope_types else ()),
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


def _rotary(text: Mapping[str, Any], family: Family, head: int) -> Iterator[Problem]:
    for key in ("rope_scaling", "rope_parameters"):
        if text.get(key) is not None and not isinstance(text[key], dict):
            yield _problem(f"{key} is {_shown(text[key])}, and must be an object or null.")
    around = {key: text[key] for key in _AROUND if key in text}
    inside = rope_parameters(text)
    if "rope_local_base_freq" in text or not inside:
        bases = ("rope_theta", "rope_local_base_freq")
        yield from _number_problems("", {key: text[key] for key in bases if key in text}, bases)
    before = text.get(_BEFORE, family.defaults.get(_BEFORE))
    for where, stated in inside.items():
        named = "rope_type" if "rope_type" in stated else "type"
        kind = stated.get(named, "default")
        if not isinstance(kind, str) or kind not in family.rope_types:
            yield _problem(
                f"{where}.{named} is {_shown(kind)}, which is no kind of rotary embedding that Transformers "
                "has for this model type.",
                f"It has {', '.join(family.rope_types)}.",
            )
        elif missing := sorted(key for key in ROPE_TYPES[kind] if key not in stated):
            yield _problem(f"{where} of the kind {kind} has no {' and no '.join(missing)}.")
        else:
            read = {**around, **stated, **({} if before is None else {_BEFORE: before})}
            yield from _number_problems(where, read, ("rope_theta", "partial_rotary_factor", *_NUMBERS[kind]))
            yield from _number_problems(where, read, _NUMBERS_OR_NULL.get(kind, ()), optional=True)
            yield from _list_problems(where, kind, read, family, head)


_AROUND = ("rope_theta", "partial_rotary_factor")
"""Of rotary embeddings, but stated beside them by what was written before Transformers 5."""
_BEFORE = "original_max_position_embeddings"
"""Stated beside them it counts, whatever they say themselves."""
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (_BEFORE,),
    "longrope": (_BEFORE,),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _BEFORE),
    "proportional": ("factor",),
}
"""What Transformers computes with, where it is stated."""
_NUMBERS_OR_NULL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
"""The same where null has a meaning, and some have one of 0."""
_LISTS = {"longrope": ("short_factor", "long_factor")}


def _number_problems(
    where: str, stated: Mapping[str, Any], keys: Iterable[str], *, optional: bool = False
) -> Iterator[Problem]:
    for key in keys:
        value = stated.get(key, 1)
        may_be = optional and (value is None or (_is_number(value) and value == 0))
        if not may_be and not _is_positive(value):
            name = f"{where}.{key}" if where else key
            or_else = ", 0 or null" if optional else ""
            yield _problem(f"{name} is {_shown(value)}, and must be a positive number{or_else}.")


def _list_problems(
    where: str, kind: str, stated: Mapping[str, Any], family: Family, head: int
) -> Iterator[Problem]:
    """A factor for each pair of the dimensions of a head that are rotated."""
    share = stated.get("partial_rotary_factor", family.defaults.get("partial_rotary_factor", 1))
    pairs = int(head * share) // 2 if _is_positive(share) and share <= 1 else None
    for key in _LISTS.get(kind, ()):
        value = stated[key]
        if not isinstance(value, list) or not all(map(_is_positive, value)):
            yield _problem(f"{where}.{key} is {_shown(value)}, and must be a list of positive numbers.")
        elif pairs is not None and len(value) != pairs:
            yield _problem(f"{where}.{key} has {len(value)} numbers; half of a head's are {pairs}.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < _LARGEST


_LARGEST = 1e30
"""Below what float32 holds: frequencies are computed in it."""


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _problem(message: str, hint: str = "") -> Problem:
    return Problem("config_invalid", f"config.json: {message}", hint, "/model")
