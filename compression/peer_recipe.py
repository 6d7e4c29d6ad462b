"""LLM Compressor's recipe.yaml, as it writes and reads it -> the steps of a Bitmill recipe.

    default_stage:
      default_modifiers:
        SmoothQuantModifier: {smoothing_strength: 0.8}
        GPTQModifier: {scheme: W8A8, targets: [Linear], ignore: [lm_head]}

Stages and their groups of modifiers come in order; so do modifiers that stand alone. A field that would
change the result and has no counterpart is an error; one that only says how that engine computes is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from compression.methods import METHODS, peer_names
from compression.schemes import SCHEMES, QuantizationArgs, Scheme
from compression.steps import TargetedStep

_OBSERVERS = {
    "minmax": "minmax",
    "memoryless_minmax": "minmax",
    "static_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
    "imatrix_mse": "imatrix",
    "gram": "gram",  # Bitmill's own
}
_HOW_IT_COMPUTES = frozenset(
    {
        "batched_quantization",
        "bypass_divisibility_checks",
        "num_calibration_steps",
        "offload_hessians",
        "requires_calibration_data",
        "sequential_targets",
        "sequential_update",
    }
)
_WITHOUT_EFFECT = (("algorithm", "smoothquant"), ("preserve_sparsity_mask", False))
"""Fields that say nothing new with this value, and have no counterpart with any other."""

_REPRESENTATION = ("num_bits", "type", "symmetric", "strategy", "dynamic")


class _Loader(yaml.SafeLoader):
    """Reads the enumerations that LLM Compressor writes as Python objects as what they hold."""


def _enumeration(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    values = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(values) != 1 or not isinstance(values[0], str):
        reason = "a Python object is no part of a recipe"
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
    return values[0]


_Loader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:compressed_tensors.", _enumeration)


def load_recipe_yaml(text: str) -> Any:
    """What a recipe file holds, ours or LLM Compressor's, for `Recipe.model_validate`.

    Raises:
        yaml.YAMLError: it is not YAML, or holds Python objects.
    """
    return yaml.load(text, _Loader)


def is_peer_recipe(document: Mapping[str, Any]) -> bool:
    """Whether a mapping is made of stages or modifiers."""
    return bool(document) and all(name.endswith(("_stage", "_modifiers", "Modifier")) for name in document)


def peer_steps(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a recipe of stages or modifiers.

    Raises:
        ValueError: a modifier or field that has no counterpart here.
    """
    return [step for name, fields in _modifiers(document) for step in _steps(name, fields)]


def _modifiers(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in document.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} holds no fields")
        if name.endswith("Modifier"):
            yield name, value
        else:
            yield from _modifiers(value)


def _steps(name: str, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = peer_names()
    if name not in names:
        raise ValueError(f"{name} has no counterpart; there are {', '.join(names)}")
    given = {
        key: value
        for key, value in fields.items()
        if key not in _HOW_IT_COMPUTES
        and (key, value) not in _WITHOUT_EFFECT
        and (value is not None or key == "actorder")
    }
    step: dict[str, Any] = {"type": names[name]}
    if issubclass(METHODS[step["type"]].step, TargetedStep):
        step["ignore"] = []  # LLM Compressor leaves nothing out unless it is told to
    observer = given.pop("observer", None) or given.pop("weight_observer", None)
    if observer is not None:
        step["observer"] = _observer(observer)
    if "actorder" in given:
        given["actorder"] = _actorder(given["actorder"])
    groups, scheme = given.pop("config_groups", None), given.pop("scheme", None)
    if isinstance(scheme, Mapping):
        for preset, targets in scheme.items():
            yield {**step, **given, "scheme": preset, "targets": targets}
    elif groups is not None:
        for group in groups.values():
            yield {**step, **given, **_group(group)}
    else:
        yield {**step, **given, **({} if scheme is None else {"scheme": scheme})}


def _observer(value: Any) -> str:
    weights = value.get("weights", value) if isinstance(value, Mapping) else value
    if weights not in _OBSERVERS:
        raise ValueError(f"the observer {weights!r} has no counterpart; there are {', '.join(_OBSERVERS)}")
    return _OBSERVERS[weights]


def _actorder(value: Any) -> str | None:
    if value in ("static", "weight", None):
        return None if value is None else "static"
    raise ValueError(f"actorder {value!r} is not supported; static (weight) is, and null")


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """One of config_groups -> the preset with the same representation, its group size and its targets."""
    weights = dict(group.get("weights") or {})
    activations = group.get("input_activations")
    scheme = next((scheme for scheme in SCHEMES.values() if _represents(scheme, weights, activations)), None)
    if scheme is None or group.get("output_activations"):
        raise ValueError("a group of config_groups is none of the schemes; name a scheme instead")
    step: dict[str, Any] = {"scheme": scheme.name, "targets": group.get("targets", ["Linear"])}
    if weights.get("strategy") == "group":
        step["group_size"] = weights["group_size"]
    if weights.get("observer") is not None:
        step["observer"] = _observer(weights["observer"])
    if weights.get("actorder") is not None:
        step["actorder"] = _actorder(weights["actorder"])
    return step


def _represents(scheme: Scheme, weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> bool:
    return _alike(scheme.weights, weights) and _alike(scheme.input_activations, activations)


def _alike(ours: QuantizationArgs | None, theirs: Mapping[str, Any] | None) -> bool:
    """Whether both say the same, in what theirs says at all."""
    if ours is None or not theirs:
        return ours is None and not theirs
    return all(theirs.get(field, getattr(ours, field)) == getattr(ours, field) for field in _REPRESENTATION)
