"""LLM Compressor's recipe.yaml, as it writes and reads it -> the steps of a Bitmill recipe.

    default_stage:
      default_modifiers:
        SmoothQuantModifier: {smoothing_strength: 0.8}
        GPTQModifier: {scheme: W8A8, targets: [Linear], ignore: [lm_head]}

Stages and their groups of modifiers come in order; so do modifiers that stand alone. A field that would
change the result and has no counterpart is an error that names it; one that only says how that engine
computes is left out, and so is one that says what is so anyway: its own files write every default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from compression.boundary import reason
from compression.methods import METHODS, peer_names
from compression.schemes import SCHEMES, QuantizationArgs, Scheme
from compression.steps import PruningStep, TargetedStep

_OBSERVERS = {
    "minmax": "minmax",
    "memoryless_minmax": "minmax",
    "static_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
    "imatrix_mse": "imatrix",
    "gram": "gram",  # Bitmill's own
}
_RANGE_OBSERVERS = ("minmax", "memoryless_minmax", "static_minmax", None)
"""Those that take the whole range, as Bitmill does of activations and of the KV cache."""
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

_SMOOTHED = {
    "smoothquant": (
        (("q_proj", "k_proj", "v_proj"), "input_layernorm"),
        (("gate_proj", "up_proj"), "post_attention_layernorm"),
    ),
    "awq": (
        (("q_proj", "k_proj", "v_proj"), "input_layernorm"),
        (("o_proj",), "v_proj"),
        (("gate_proj", "up_proj"), "post_attention_layernorm"),
        (("down_proj",), "up_proj"),
    ),
}
"""Its default mappings: the linears that are balanced, and what is smoothed in front of them. Bitmill finds
these in any model by itself."""

_ARGS_DEFAULTS: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
    "scale_dtype": None,
    "zp_dtype": None,
    "observer": None,
    "observer_kwargs": {},
}
"""The fields of compressed-tensors' QuantizationArgs."""
_REPRESENTATION = ("num_bits", "type", "symmetric", "strategy", "dynamic")
_SCALE_DTYPES = {None: None, "E8M0": "torch.uint8", "F8_E4M3": "torch.float8_e4m3fn"}
_GROUP_FIELDS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})


class _Loader(yaml.SafeLoader):
    """Reads what LLM Compressor writes as Python objects as what it holds: enumerations, tuples, and its sign
    for a field that was not given."""


def _enumeration(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    values = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(values) != 1 or not isinstance(values[0], str):
        raise _no_object(node)
    return values[0]


def _sentinel(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    values = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if not values or not isinstance(values[0], str):
        raise _no_object(node)
    return None if values[0] == "not_provided" else values[0]


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.SequenceNode):
        raise _no_object(node)
    return loader.construct_sequence(node, deep=True)


def _no_object(node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(
        None, None, "a Python object is no part of a recipe", node.start_mark
    )


_OBJECT = "tag:yaml.org,2002:python/object/apply:"
_Loader.add_multi_constructor(f"{_OBJECT}compressed_tensors.", _enumeration)
_Loader.add_constructor(f"{_OBJECT}llmcompressor.sentinel.Sentinel", _sentinel)
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def load_recipe_yaml(text: str) -> Any:
    """What a recipe file holds, ours or LLM Compressor's, for `Recipe.model_validate`.

    Raises:
        yaml.YAMLError: it is not YAML, or holds Python objects.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except (ValueError, RecursionError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise yaml.YAMLError(reason(error)) from error  # of the 99th of a month, say


def is_peer_recipe(document: Mapping[Any, Any]) -> bool:
    """Whether a mapping is made of stages or modifiers; `strict` may stand beside them."""
    names = [name for name in document if name != "strict"]
    endings = ("_stage", "_modifiers", "Modifier")
    return bool(names) and all(isinstance(name, str) and name.endswith(endings) for name in names)


def peer_steps(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a recipe of stages or modifiers.

    Raises:
        ValueError: a modifier or field that has no counterpart here.
    """
    return [
        step
        for name, fields in _modifiers({key: value for key, value in document.items() if key != "strict"})
        for step in _steps(name, fields)
    ]


def _modifiers(document: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name, value in document.items():
        if name == "run_type":
            if value != "oneshot":
                raise ValueError(f"run_type {value!r} has no counterpart; oneshot has")
        elif not isinstance(value, Mapping):
            raise ValueError(f"{name} holds no fields")
        elif str(name).endswith("Modifier"):
            yield str(name), value
        else:
            yield from _modifiers(value)


def _steps(name: str, fields: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    names = peer_names()
    if name not in names:
        raise ValueError(f"{name} has no counterpart; there are {', '.join(names)}")
    if unnamed := [key for key in fields if not isinstance(key, str)]:
        raise ValueError(f"{name} has a field {unnamed[0]!r}")
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
    if issubclass(METHODS[step["type"]].step, PruningStep) and "targets" in given:
        given["targets"] = _linears_inside(given["targets"])
    if step["type"] in _SMOOTHED and _are_default(given.get("mappings"), _SMOOTHED[step["type"]]):
        del given["mappings"]
    if step["type"] in _SMOOTHED and given.get("ignore") == []:
        del given["ignore"]
    observer = _weight_observer(given)
    if observer is not None:
        step["observer"] = observer
    if "actorder" in given:
        given["actorder"] = _actorder(given["actorder"])
    if "kv_cache_scheme" in given:
        given["kv_cache_scheme"] = _kv_cache_scheme(given["kv_cache_scheme"])
    groups, scheme = given.pop("config_groups", None), given.pop("scheme", None)
    if groups is not None and scheme is not None:
        raise ValueError(f"{name} has both scheme and config_groups; give one of them")
    if isinstance(scheme, Mapping):
        for preset, targets in scheme.items():
            yield {**step, **given, "scheme": preset, "targets": targets}
    elif groups is not None:
        for group in _mapping(groups, "config_groups").values():
            yield {
                **step,
                **given,
                **_beside(_group(_mapping(group, "a group of config_groups")), step, given),
            }
    else:
        yield {**step, **given, **({} if scheme is None else {"scheme": scheme})}


def _beside(group: dict[str, Any], step: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a group adds to its modifier: the modifier's observer counts, and orders must not contradict."""
    if "actorder" in group and group["actorder"] != given.get("actorder", group["actorder"]):
        raise ValueError(
            f"actorder is {given['actorder']!r}, and {group['actorder']!r} in config_groups; give one of them"
        )
    return {key: value for key, value in group.items() if key != "observer" or "observer" not in step}


def _mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} holds no fields")
    return value


def _linears_inside(targets: Any) -> Any:
    """Its sparsity modifiers prune the linears inside of what they target, decoder layers mostly; ours target
    linears: what ends with the layer's name goes on behind it."""
    if isinstance(targets, str):
        targets = [targets]
    if not isinstance(targets, Sequence) or not all(isinstance(target, str) for target in targets):
        return targets
    return [_inside(target) for target in targets]


def _inside(target: str) -> str:
    if target.startswith("re:") and target.endswith("$") and not target.endswith(r"\$"):
        return rf"{target[:-1]}(\.|$)"
    if re.fullmatch(r"\w+(\.\w+)*\.\d+", target):  # model.layers.3
        return rf"re:{re.escape(target)}\."
    return target


def _are_default(mappings: Any, default: Sequence[tuple[Sequence[str], str]]) -> bool:
    """Whether mappings are those that it finds in a Llama, in whatever order and form it writes them."""
    if not isinstance(mappings, Sequence) or isinstance(mappings, str):
        return False
    read = [_mapping_of(entry) for entry in mappings]
    return None not in read and {entry for entry in read if entry} == {
        (frozenset(balanced), smoothed) for balanced, smoothed in default
    }


def _mapping_of(entry: Any) -> tuple[frozenset[str], str] | None:
    """(the linears that are balanced, what is smoothed), by the ends of their names."""
    if isinstance(entry, Mapping):
        if set(entry) - {"smooth_layer", "balance_layers", "activation_hook_target"}:
            return None
        if entry.get("activation_hook_target") is not None:
            return None
        entry = (entry.get("balance_layers"), entry.get("smooth_layer"))
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
        return None
    balanced, smoothed = entry
    if not isinstance(balanced, Sequence) or isinstance(balanced, str) or not isinstance(smoothed, str):
        return None
    names = [_end_of(pattern) for pattern in (*balanced, smoothed)]
    return (frozenset(names[:-1]), names[-1])


def _end_of(pattern: Any) -> str:
    return str(pattern).removeprefix("re:.*").removesuffix("$")


def _weight_observer(given: dict[str, Any]) -> str | None:
    """The step's observer, out of its fields, that of the weights; others have to be what ours are."""
    observer = given.pop("observer", None)
    separate = [name for name in ("weight_observer", "input_observer", "output_observer") if name in given]
    if observer is not None and separate:
        raise ValueError(f"both observer and {separate[0]} are given; give one of them")
    observers = {"weights": observer} if not isinstance(observer, Mapping) else dict(observer)
    for kind in ("input", "output"):
        value = given.pop(f"{kind}_observer", observers.pop(kind, None))
        if value not in _RANGE_OBSERVERS:
            raise ValueError(f"{kind}_observer {value!r} has no counterpart; minmax has")
    weights = observers.pop("weights", None)
    if observers:
        raise ValueError(f"observer {next(iter(observers))!r} has no counterpart; weights has")
    chosen = given.pop("weight_observer", weights)
    return None if chosen is None else _observer(chosen)


def _observer(value: Any) -> str:
    if not isinstance(value, str) or value not in _OBSERVERS:
        raise ValueError(f"the observer {value!r} has no counterpart; there are {', '.join(_OBSERVERS)}")
    return _OBSERVERS[value]


def _actorder(value: Any) -> str | None:
    if value in ("static", "weight", None):
        return None if value is None else "static"
    raise ValueError(f"actorder {value!r} is not supported; static (weight) is, and null")


def _kv_cache_scheme(value: Any) -> dict[str, Any]:
    """What `KVCacheScheme` takes; its other fields have to say nothing."""
    fields = dict(_mapping(value, "kv_cache_scheme"))
    if fields.get("observer") in _RANGE_OBSERVERS:
        fields.pop("observer", None)
    for name in list(fields):
        if name not in _REPRESENTATION and name in _ARGS_DEFAULTS:
            if fields[name] not in (_ARGS_DEFAULTS[name], None):
                raise ValueError(f"{name} {fields[name]!r} of kv_cache_scheme has no counterpart")
            del fields[name]
    return fields


def _group(group: Mapping[Any, Any]) -> dict[str, Any]:
    """One of config_groups -> the preset with the same representation, its group size and its targets."""
    if unknown := set(group) - _GROUP_FIELDS:
        raise ValueError(f"{min(map(str, unknown))} in a group of config_groups has no counterpart")
    weights = _args(group.get("weights") or {}, "weights")
    activations = group.get("input_activations")
    inputs = _args(activations, "input_activations") if activations else None
    scheme = next((scheme for scheme in SCHEMES.values() if _represents(scheme, weights, inputs)), None)
    if scheme is None or group.get("output_activations"):
        raise ValueError("a group of config_groups is none of the schemes; name a scheme instead")
    if group.get("format") not in (None, scheme.format):
        raise ValueError(
            f"format {group['format']!r} of {scheme.name} has no counterpart; {scheme.format} has"
        )
    if inputs is not None and inputs["observer"] not in _RANGE_OBSERVERS:
        raise ValueError(f"the observer {inputs['observer']!r} of input_activations has no counterpart")
    step: dict[str, Any] = {"scheme": scheme.name, "targets": group.get("targets", ["Linear"])}
    if scheme.takes_group_size:
        step["group_size"] = weights["group_size"]
    if weights["observer"] is not None:
        step["observer"] = _observer(weights["observer"])
    if weights["actorder"] is not None:
        step["actorder"] = _actorder(weights["actorder"])
    return step


def _args(value: Any, what: str) -> dict[str, Any]:
    """QuantizationArgs with every default written out, as it reads them."""
    given = _mapping(value, what)
    if unknown := set(given) - set(_ARGS_DEFAULTS):
        raise ValueError(f"{min(map(str, unknown))} of {what} has no counterpart")
    args = {**_ARGS_DEFAULTS, **given}
    if args["observer_kwargs"]:
        raise ValueError(f"observer_kwargs of {what} have no counterpart")
    if args["zp_dtype"] not in (None, "torch.int8"):
        raise ValueError(f"zp_dtype {args['zp_dtype']!r} of {what} has no counterpart; torch.int8 has")
    if args["strategy"] is None:
        by_size = {None: "tensor", -1: "channel"}
        args["strategy"] = by_size.get(args["group_size"], "group") if _is_size(args["group_size"]) else None
    return args


def _is_size(value: Any) -> bool:
    return value is None or type(value) is int


def _represents(scheme: Scheme, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> bool:
    if not _alike(scheme.weights, weights, any_group_size=scheme.takes_group_size):
        return False
    if scheme.input_activations is None or inputs is None:
        return scheme.input_activations is None and inputs is None
    return _alike(scheme.input_activations, inputs)


def _alike(ours: QuantizationArgs, theirs: Mapping[str, Any], *, any_group_size: bool = False) -> bool:
    """Whether both say the same."""
    block = theirs["block_structure"]
    return (
        all(theirs[field] == getattr(ours, field) for field in _REPRESENTATION)
        and (any_group_size or theirs["group_size"] in (ours.group_size, -1 if not ours.group_size else 0))
        and (None if block is None else list(block)) == (ours.block_structure and list(ours.block_structure))
        and theirs["scale_dtype"] in (None, _SCALE_DTYPES[ours.scale_dtype])
    )
